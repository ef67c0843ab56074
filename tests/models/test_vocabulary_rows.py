"""A model of which some tokens are read is the dense one that has no others."""

import pytest
import torch

from sp3llm.models import families
from sp3llm.models.checkpoint import identity
from sp3llm.models.families import count_parameters
from sp3llm.models.shapes import Shape
from sp3llm.vocabulary.kept import Kept, kept_of
from sp3llm.vocabulary.restricting import dense_rows, restricted_checkpoint, shared_rows
from tests.conftest import (
    TINY,
    disk_tensors,
    family_of_model,
    logits_of,
    relative_error,
    save_model,
    stock_model,
    tiny_model,
)

# With padding behind the tokens kept, 17 of 96, and in an order of their own.
KEPT = kept_of([0, 1, 2, *range(30, 44)], 96, multiple=8)


@pytest.mark.parametrize("variant", TINY)
def test_logits_are_the_dense_models_renormalised(variant, tmp_path):
    model = tiny_model(variant)
    dense, family = save_model(model, tmp_path), family_of_model(model)
    small = restricted_checkpoint(dense, family, KEPT)
    tensors = disk_tensors(small, family)
    restricted = stock_model(small.config, tensors, exact=False)
    rows = torch.tensor(dense_rows(KEPT, 96))
    ids = torch.randint(17, (3, 20), generator=torch.Generator().manual_seed(1))

    expected = logits_of(model, rows[ids])[..., rows]
    found = logits_of(restricted, ids)
    assert found.shape[-1] == 24
    assert relative_error(found.log_softmax(-1), expected.log_softmax(-1)) < 2e-6
    # Over the tokens that text may have; what pads costs them what it cost before, or less.
    of_dense = logits_of(model, rows[ids]).log_softmax(-1)[..., rows[:17]]
    assert (found.log_softmax(-1)[..., :17] >= of_dense - 1e-9).all()


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "opt", "opt-projected", "mixtral"])
def test_tables_alone_lose_rows_and_the_count_says_so(variant, tmp_path):
    model = tiny_model(variant)
    dense, family = save_model(model, tmp_path), family_of_model(model)
    small = restricted_checkpoint(dense, family, KEPT)
    before, after = disk_tensors(dense, family), disk_tensors(small, family)
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    tied = families.is_tied(family, dense.config)
    assert len(changed) == (1 if tied else 2)
    saved = count_parameters(family, dense.config) - count_parameters(family, small.config)
    shape = Shape.of(family, dense.config)
    assert saved == shape.vocabulary_parameters() * 72 // 96
    assert sum(tensor.numel() for tensor in after.values()) == count_parameters(
        family, small.config
    )
    assert small.stored_bytes(after) == dense.stored_bytes(before) - 8 * saved


def test_tokens_kept_are_part_of_the_identity(tmp_path):
    model = tiny_model("llama")
    dense, family = save_model(model, tmp_path), family_of_model(model)
    others = kept_of([0, 1, 2, *range(31, 45)], 96, multiple=8)
    found = [identity(restricted_checkpoint(dense, family, kept)) for kept in (KEPT, others)]
    assert found[0] != found[1]
    assert found[0]["model.safetensors"] == identity(dense)["model.safetensors"]


def test_rows_are_found_again_from_the_tokens_of_both():
    dense_ids = {f"t{number}": number for number in range(90)}  # and six rows of padding
    small_ids = {f"t{old}": new for new, old in enumerate(KEPT.old_ids)}
    assert shared_rows(dense_ids, small_ids, 24, 96) == dense_rows(KEPT, 96)
    assert dense_rows(KEPT, 96)[17:] == tuple(range(89, 96))
    assert shared_rows(dense_ids, {**small_ids, "new": 17}, 24, 96) is None
    assert shared_rows(dense_ids, {"t1": 0, "t2": 2}, 24, 96) is None
    assert shared_rows(dense_ids, small_ids, 16, 96) is None
    assert dense_rows(Kept(tuple(range(96)), 96), 96) == tuple(range(96))
