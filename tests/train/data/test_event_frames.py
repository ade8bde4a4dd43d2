import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
from seal_fast.train.data.aedat import Events, write_aedat
from seal_fast.train.data.frames import frames_by_number, recording_to_frames


@given(
    number=st.integers(1, 60), T=st.integers(1, 13), H=st.integers(1, 9), W=st.integers(1, 9), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=80)
def test_equals_spikingjelly(spikingjelly_frames, number, T, H, W, seed):
    generator = np.random.default_rng(seed)
    events = Events(
        t=np.sort(generator.integers(0, 1000, number)),
        x=generator.integers(0, W, number),
        y=generator.integers(0, H, number),
        p=generator.integers(0, 2, number),
    )
    frames = frames_by_number(events, T, H, W)
    assert frames.dtype == np.float32
    assert np.array_equal(frames, spikingjelly_frames(events, T, H, W))
    assert frames.sum() == number


def test_narrow_types_do_not_overflow():
    events = Events(*(np.full(3, value, np.uint8) for value in (0, 127, 127, 1)))
    frames = frames_by_number(events, 1, 128, 128)
    assert frames[0, 1, 127, 127] == 3


def test_no_events():
    events = Events(*(np.zeros(0, np.int64) for _ in range(4)))
    assert np.array_equal(frames_by_number(events, 3, 4, 5), np.zeros((3, 2, 4, 5)))


def test_recording_is_resized_once(spikingjelly_frames, tmp_path):
    """Bilinear with antialiasing, as torch's own interpolation computes it."""
    events = makers.random_events(np.random.default_rng(0), 5000)
    write_aedat(tmp_path / "a.aedat", events)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(spikingjelly_frames(events, 4, 128, 128)).float(), (48, 48), mode="bilinear", antialias=True
    )
    frames = recording_to_frames(tmp_path / "a.aedat", 4)
    assert frames.shape == (4, 2, 48, 48)
    assert frames.dtype == np.float32
    assert np.array_equal(frames, expected.numpy())
