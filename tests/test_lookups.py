"""Laws of tables whose rows are looked up by ids: what each token is told follows the ids that its host asks for."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from foreign_hosts import FOREIGN, READER, D, Reader, applied, inputs, of_transformers, shaken, tokens, untouched
from torch import Tensor, nn

import lape
from lape.errors import UsageError

SCHEMES = [{"join": "shared"}, {"join": "unshared"}, {"join": "lape"}, {"start": "preserve"}]
EVERY_SCHEME = pytest.mark.parametrize("names", SCHEMES, ids=str)
IDS = torch.tensor([[3, 0, 1, 1, 11, 7], [5, 6, 7, 8, 9, 10]])  # in any order, some twice, others in each sample


def joined(name: str, names: dict[str, str]) -> nn.Module:
    """A host with a join that is no longer where it started."""
    model = shaken(applied(name, **names))
    for path, parameter in model.named_parameters():
        if path.endswith("pe_norm.amount"):
            nn.init.constant_(parameter, 0.5)
    return model


def told_by_sample(name: str, model: nn.Module, ids: Tensor) -> nn.Module:
    """The untouched model without its table, with the rows `ids` of every rung of `model` added sample by sample."""
    plain, norms = untouched(name), FOREIGN[name].norms
    nn.init.zeros_(plain.get_parameter(FOREIGN[name].table or ""))

    def rows_of(part: Tensor) -> Tensor:
        return torch.stack([part[0][of_sample + FOREIGN[name].unused] for of_sample in ids])

    for layer, rung in enumerate(lape.ladder(model)):
        norm = norms.format(layer)
        if rung.attention is not None:
            told = rows_of(rung.attention)
            plain.get_submodule(norm).register_forward_hook(lambda module, given, output, told=told: output + told)
        if rung.residual is not None:
            told = rows_of(rung.residual)
            block = plain.get_submodule(norm.rpartition(".")[0])
            block.register_forward_pre_hook(lambda module, given, told=told: (given[0] + told, *given[1:]))
    return plain


@EVERY_SCHEME
@pytest.mark.parametrize("folded", [False, True], ids=["as-trained", "folded"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "clip-text"])
@torch.no_grad()
def test_each_sample_is_told_of_the_rows_that_its_ids_name(name: str, names: dict[str, str], folded: bool) -> None:
    model, words = joined(name, names), inputs(name)[:, :6]
    expected = told_by_sample(name, model, IDS)(words, position_ids=IDS).last_hidden_state
    model = lape.fold(model) if folded else model
    found = model(words, position_ids=IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, tokens(model, words), atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_default_join_changes_nothing_for_any_ids(name: str) -> None:
    model, words = untouched(name), inputs(name)[:, :6]
    before = model(words, position_ids=IDS).last_hidden_state
    assert torch.equal(applied(name, model, join="default")(words, position_ids=IDS).last_hidden_state, before)


# --- Text that is continued


def writer(kind: str) -> nn.Module:
    """A model that writes: GPT-2 or OPT with a head."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=D, n_layer=3, n_head=2, n_positions=24, **shape)
    else:
        shape |= {"hidden_size": D, "word_embed_proj_dim": D, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.OPTConfig(ffn_dim=48, max_position_embeddings=24, **shape)
    model = of_transformers({"gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM"}[kind], kind)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


WRITERS = pytest.mark.parametrize("kind", ["gpt2", "opt"])


@WRITERS
@EVERY_SCHEME
@torch.no_grad()
def test_a_cache_changes_nothing(kind: str, names: dict[str, str]) -> None:
    model = shaken(lape.apply(writer(kind), **names))
    words = torch.randint(2, 50, (2, 5))
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    asked |= {"output_logits": True, "attention_mask": torch.ones_like(words)}
    cached = model.generate(words, use_cache=True, **asked)
    whole = model.generate(words, use_cache=False, **asked)
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    at_once = model(cached.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), at_once, rtol=1e-4, atol=1e-4)


@WRITERS
@EVERY_SCHEME
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(kind: str, names: dict[str, str]) -> None:
    model = shaken(lape.apply(writer(kind), **names))
    words = torch.randint(2, 50, (1, 5))
    other = torch.randint(2, 50, (1, 8))  # of a batch the shorter text is padded
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), words], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    asked |= {"output_logits": True}
    both = model.generate(torch.cat([padded, other]), attention_mask=mask, **asked)
    for sample, alone in enumerate((words, other)):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **asked)
        assert torch.equal(both.sequences[sample, 8:], expected.sequences[0, alone.shape[1] :])
        found = torch.stack(both.logits, 1)[sample]
        torch.testing.assert_close(found, torch.stack(expected.logits, 1)[0], rtol=1e-4, atol=1e-4)


def test_ids_behind_the_last_row_are_refused_with_the_length() -> None:
    model = applied("gpt2")
    with pytest.raises(UsageError, match=r"position table is for 12 tokens.*row 12.*shorter"):
        model(inputs("gpt2")[:, :2], position_ids=torch.tensor([[0, 12]]))


# --- Images with a mask


@pytest.mark.parametrize("name", ["idefics2", "idefics3", "smolvlm"])
@pytest.mark.parametrize("names", SCHEMES[1:], ids=str)
@torch.no_grad()
def test_patches_are_told_of_the_rows_that_their_masked_image_asks_for(name: str, names: dict[str, str]) -> None:
    model, x = joined(name, names), inputs(name)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 2:], mask[1, :, 3:] = False, False  # the second image is of 2x3 patches
    rows = torch.arange(16).expand(2, -1).clone()
    rows[1] = torch.where(
        mask[1], torch.tensor([0, 8])[[0, 1, 0, 0]][:, None] + torch.tensor([0, 1, 2, 0]), 0
    ).flatten()
    expected = told_by_sample(name, model, rows)(x, patch_attention_mask=mask).last_hidden_state
    found = model(x, patch_attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.flatten(1)], expected[mask.flatten(1)], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], tokens(model, x)[1], atol=1e-3)


# --- Patches that are shuffled and dropped


@EVERY_SCHEME
@torch.no_grad()
def test_masked_autoencoders_tell_the_patches_that_are_left(names: dict[str, str]) -> None:
    """The encoder computes for the patches that it keeps what it would for these alone, with their own positions."""
    model, x = joined("vit-mae", names).mae, inputs("vit-mae")
    model.config.mask_ratio = 0.75
    noise = torch.rand(2, 16)
    left = noise.argsort(dim=1)[:, :4]
    plain = told_by_sample("vit-mae", model, torch.cat([torch.zeros(2, 1, dtype=torch.long), left + 1], dim=1)).mae
    plain.config.mask_ratio = 0.75
    found, expected = model(x, noise=noise), plain(x, noise=noise)
    assert found.last_hidden_state.shape == (2, 5, D)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.ids_restore, expected.ids_restore)


def test_peg_is_refused_where_patches_are_not_in_their_places() -> None:
    model, x = applied("vit-mae", join="default", pe="peg"), inputs("vit-mae")
    tokens(model, x)
    model.mae.config.mask_ratio = 0.75
    with pytest.raises(UsageError, match=r"some are not in their places \(dropped, shuffled\)"):
        tokens(model, x)


# --- Classes of one's own


class Twice(Reader):
    """Looks up its first word on its own."""

    def forward(self, words: Tensor) -> Tensor:
        at = torch.arange(words.shape[1])
        x = self.words(words) + torch.cat([self.places(at[:1]), self.places(at[1:])])
        for block in self.depths:
            x = block(x)
        return x


def test_two_lookups_in_one_forward_are_refused() -> None:
    model = lape.apply(Twice().eval(), host=replace(READER, name="twice"), grid=(1, 12))
    with pytest.raises(UsageError, match=r"Twice looks positions up twice in one forward"):
        model(inputs("reader"))


class Backwards(nn.Embedding):
    """An embedding with a forward of its own."""

    def forward(self, places: Tensor) -> Tensor:
        return super().forward(11 - places)


def test_an_embedding_of_ones_own_keeps_its_forward() -> None:
    model = untouched("reader")
    model.places = Backwards(12, D)
    default = copy.deepcopy(model)
    x = inputs("reader")
    before = model(x)
    assert torch.equal(applied("reader", default, join="default")(x), before)
    shaken(applied("reader", model))
    told: list[Tensor] = []
    model.depths[0].before.register_forward_hook(
        lambda norm, given, output: told.append(output - norm.forward(given[0]))
    )
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    expected = lape.ladder(model)[0].attention
    assert expected is not None
    torch.testing.assert_close(told[0], expected.flip(1).expand(2, -1, -1), rtol=1e-4, atol=1e-5)
