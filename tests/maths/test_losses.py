"""The losses that a model is scored by."""

import pytest
import torch

from sp3llm.maths import losses
from sp3llm.maths.losses import drawn_labels, label_gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_cross_entropies_whatever_the_size_of_pieces(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = 9 * torch.randn(101, 1000, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(0, 1000, (101,), generator=generator)
    wide = logits if dtype == torch.float64 else logits.float()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="none").double()
    for tokens in (1000, 7, 1, 0):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", tokens * 1000)
        assert torch.equal(losses.label_losses(logits, labels), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_divergences_and_draws_are_the_same_whatever_the_size_of_pieces(
    dtype, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    logits, dense = (
        9 * torch.randn(2, 53, 1000, dtype=torch.float64, generator=generator).to(dtype)
    ).unbind()
    labels = torch.randint(0, 1000, (53,), generator=generator)
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
    wide.requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, labels, reduction="sum")
    (gradients,) = torch.autograd.grad(loss, wide)
    nats = torch.nn.functional.kl_div(
        wide.log_softmax(-1), dense.to(wide).log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    draws = drawn_labels(logits, torch.Generator().manual_seed(1))
    for tokens in (1000, 7, 1, 0):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", tokens * 1000)
        found = label_gradients(logits, labels)
        assert found.dtype == dtype
        assert torch.allclose(found, gradients.to(dtype), atol=1e-6, rtol=2**-8)
        several = losses.distribution_divergences([logits, dense], dense)
        assert torch.allclose(several[0], nats.double(), rtol=1e-4)
        assert not several[1].any()
        again = drawn_labels(logits, torch.Generator().manual_seed(1))
        assert torch.equal(draws, again)


@pytest.mark.parametrize("shape", [(53, 40), (3, 17, 40)])
def test_what_is_learned_by_is_the_divergence_and_its_gradient(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    cut = student[..., :-1, :], teacher[..., :-1, :]  # as labels shift them
    own, dense = ((one / 2).log_softmax(-1) for one in cut)
    expected = 4 * (dense.exp() * (dense - own)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(0.3 * expected, student)
    for tokens in (1000, 7, 1, 0):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", tokens * shape[-1])
        found = losses.divergence(*cut, 2.0)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        assert torch.allclose(*torch.autograd.grad(0.3 * found, student), gradient, rtol=1e-10)
        with torch.no_grad():
            assert losses.divergence(*cut, 2.0).item() == pytest.approx(expected.item(), rel=1e-12)


def test_drawn_labels_come_as_often_as_the_distribution_says():
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0, 1.5]).repeat(40_000, 1)
    labels = drawn_labels(logits, torch.Generator().manual_seed(0))
    found = torch.bincount(labels, minlength=5) / len(labels)
    assert torch.allclose(found, logits[0].softmax(-1), atol=0.01)
    assert found[3] == 0
    again = drawn_labels(logits, torch.Generator().manual_seed(0))
    assert torch.equal(labels, again)
