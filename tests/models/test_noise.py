"""Dropout as a hash: as rare as asked, unrelated wherever it should be, and the same for the same row."""

import pytest
import torch

from ds_pretrain.models.noise import dropout, dropped, row_keys

ROWS, LENGTH, WIDTH = 16, 256, 256
TOKENS = torch.randint(0, 30_000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
KEY = row_keys(TOKENS, 7)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1].item()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_as_many_are_dropped_as_asked_at_every_position_and_in_every_channel(p):
    found = dropped(KEY, 3, WIDTH, p).float()
    assert found.mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / found.numel()) ** 0.5)
    for dims, count in ((-1, WIDTH), ((0, 1), ROWS * LENGTH)):
        assert found.mean(dims).std().item() == pytest.approx((p * (1 - p) / count) ** 0.5, rel=0.15)


def test_masks_of_other_steps_places_rows_positions_and_channels_are_unrelated():
    one, limit = dropped(KEY, 3, WIDTH, 0.1), 5 / (ROWS * LENGTH * WIDTH) ** 0.5
    others = [
        dropped(row_keys(TOKENS, 8), 3, WIDTH, 0.1),
        dropped(KEY, 4, WIDTH, 0.1),
        one.roll(1, 0),
        one.roll(1, 1),
        one.roll(1, 2),
    ]
    assert all(abs(correlation(one, other)) < limit for other in others)
    for units in (one.flatten(0, 1)[:1024], one.flatten(0, 1).t()):  # positions, channels: each with every other
        table = torch.corrcoef(units.float()).fill_diagonal_(0)
        assert table.std().item() == pytest.approx(units.shape[1] ** -0.5, rel=0.05)


def test_a_part_of_a_row_has_its_part_of_the_mask():
    """So ranks that hold other positions, rows or micro-batches draw what one device would."""
    whole = dropped(KEY, 3, WIDTH, 0.1)
    assert torch.equal(dropped(KEY[:, 64:128], 3, WIDTH, 0.1), whole[:, 64:128])
    assert torch.equal(dropped(row_keys(TOKENS[5:6], 7), 3, WIDTH, 0.1), whole[5:6])
    assert not torch.equal(dropped(row_keys(TOKENS.roll(1, 1), 7), 3, WIDTH, 0.1), whole.roll(1, 1))


def test_what_is_left_is_scaled_up_and_takes_the_gradient():
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out, gone = dropout(x, KEY, 3, 0.25), dropped(KEY, 3, WIDTH, 0.25)
    torch.testing.assert_close(out, torch.where(gone, 0.0, x / 0.75))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, torch.where(gone, 0.0, torch.full_like(x, 1 / 0.75)))
