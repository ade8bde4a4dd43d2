"""What every operator's room needs to start a kernel."""
