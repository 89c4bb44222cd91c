"""A row cache gives what a family's own growing cache gives, wherever its rows stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_cases import make_pair, save_adapter, save_base
from helpers.family_configs import FAMILIES, VARIANTS, WINDOW, alone, make_tiny
from helpers.graph_cases import with_graphs
from helpers.tiny import make_model, random_ids
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ensembler.engine.member_set import MOST_STATIC, MemberSet
from ensembler.engine.model_runner import Step
from ensembler.engine.row_cache import SMALLEST, RowCache, Slots, bucket, why_not_by_row
from ensembler.errors import InputError, RunError

ROOM = 40
TEXTS = [random_ids(1, length, seed=length)[0].tolist() for length in (15, 20)]
PROMPTS = (9, 14)  # tokens of each that are read at once, before the steps
MOST_SKIPPED = 5
CLOSE = 1e-5  # of the largest logit


def build(name: str) -> PreTrainedModel | None:
    """The tiny model, or None where the installed transformers cannot make it."""
    try:
        return make_tiny(name)
    except Exception:  # whatever an older or newer transformers raises for a family that it does not know
        return None


def build_with(name: str, attention: str) -> PreTrainedModel:
    """The tiny model with an attention; the test is skipped where there is none such."""
    model = build(name)
    if model is None:
        pytest.skip(f"transformers cannot make {name}")
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{name} has no attention {attention!r}")
    return model


@torch.no_grad()
def by_its_own_cache(model: PreTrainedModel, text: Sequence[int], num_prompt: int) -> Tensor:
    """The logits (positions, V) of one text, prompt first, on the cache that transformers gives the model."""
    cache = DynamicCache(config=model.config)
    parts = [torch.tensor([ids]) for ids in (text[:num_prompt], text[num_prompt:]) if ids]
    return torch.cat([model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0] for ids in parts])


@torch.no_grad()
def read(
    members: MemberSet, cache: RowCache, pieces: Sequence[tuple[Sequence[int], int]], *, left: bool = False, **more: Any
) -> list[Tensor]:
    """Read for each row a piece (ids, first position), padded to the longest; the logits (n, V) of each piece."""
    longest = max(len(ids) for ids, _ in pieces)
    all_ids, all_positions, places = [], [], []
    for ids, start in pieces:
        num, here = longest - len(ids), list(range(start, start + len(ids)))
        padded = ([0] * num, [-1] * num)
        all_ids.append(padded[0] + list(ids) if left else list(ids) + padded[0])
        all_positions.append(padded[1] + here if left else here + padded[1])
        places.append(slice(num, None) if left else slice(0, len(ids)))
    step = Step(torch.tensor(all_ids), None, torch.tensor(all_positions), **more)
    logits = members.logits(step, cache)["one"].clone()
    return [row[place] for row, place in zip(logits, places, strict=True)]


def read_texts(
    members: MemberSet,
    cache: RowCache,
    *,
    left: bool = False,
    sizes: Sequence[int] = (1, 2, 1, 2),
) -> list[Tensor]:
    """The logits of both texts: their prompts, ragged, then steps of `sizes` tokens at each row's own position."""
    got = [
        [part] for part in read(members, cache, [(t[:n], 0) for t, n in zip(TEXTS, PROMPTS, strict=True)], left=left)
    ]
    done = 0
    for size in sizes:
        pieces = [(t[n + done : n + done + size], n + done) for t, n in zip(TEXTS, PROMPTS, strict=True)]
        for one, part in zip(got, read(members, cache, pieces), strict=True):
            one.append(part)
        done += size
    return [torch.cat(one) for one in got]


def assert_close(found: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    assert (found - expected).abs().max() < close * expected.abs().max()


# -- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_a_family_gives_what_its_own_cache_gives(name: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded at either side, then in steps of one and of two; launched one by one, and by graphs on fixed buffers."""
    model = build_with(name, attention)
    assert why_not_by_row(model) is None
    expected = [by_its_own_cache(model, text, num) for text, num in zip(TEXTS, PROMPTS, strict=True)]
    for left in (True, False):
        members = alone(model)
        for found, wanted in zip(read_texts(members, members.row_cache(2, ROOM), left=left), expected, strict=True):
            assert_close(found, wanted)
    members = with_graphs(alone(model), monkeypatch)
    for found, wanted in zip(read_texts(members, members.row_cache(2, ROOM)), expected, strict=True):
        assert_close(found, wanted)
    assert members.graphs is not None
    assert members.graphs.num_recorded == 3  # steps of one and of two, and prompts of so few tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_rows_that_stand_together(name: str, attention: str) -> None:
    """Prompts with a mask, and so long that they go without; the second time in a cache that has been used."""
    model = build_with(name, attention)
    members = alone(model)
    cache = members.row_cache(2, ROOM)
    texts = [random_ids(1, 24, seed=seed)[0].tolist() for seed in (3, 4)]
    close = 1e-4 if name == "bitnet" else CLOSE  # it rounds activations to integers
    for num in (MOST_STATIC - 8, MOST_STATIC + 2, MOST_STATIC + 2):
        prompts = read(members, cache, [(text[:num], 0) for text in texts])
        steps = read(members, cache, [(text[num : num + 3], num) for text in texts])
        for prompt, step, text in zip(prompts, steps, texts, strict=True):
            assert_close(torch.cat([prompt, step]), by_its_own_cache(model, text[: num + 3], num), close)


def test_hardly_a_family_is_left_out() -> None:
    missing = [name for name in (*FAMILIES, *VARIANTS) if build(name) is None]
    assert len(missing) <= MOST_SKIPPED, f"transformers cannot make {', '.join(missing)}"
    assert len(FAMILIES) > 40


def test_families_are_eligible_one_by_one() -> None:
    assert "has not been tried" in str(why_not_by_row(make_model("bloom")))
    model = make_tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "load it with attention 'sdpa'" in str(why_not_by_row(model))
    assert "ALiBi" in str(why_not_by_row(make_tiny("falcon", alibi=True)))
    assert "one cannot keep a cache of rows" in str(alone(make_model("bloom")).why_not_by_row())


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "phi3"])
@pytest.mark.parametrize("window", [1, 2, WINDOW, 14, 15, 100])
def test_windows_shorter_and_longer_than_the_text(family: str, window: int) -> None:
    model = make_tiny(family, sliding_window=window)
    members = alone(model)
    found = read_texts(members, members.row_cache(2, ROOM))
    for one, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            assert_close(one, model(input_ids=torch.tensor([text]), use_cache=False).logits[0])


# -- rows that go back, move and grow ---------------------------------------------------------------------------------

MODELS = ("llama", "gemma2", "mistral", "gpt2", "mpt")


@pytest.mark.parametrize("family", MODELS)
def test_a_row_is_rolled_back_by_reading_again(family: str) -> None:
    """Tokens read behind the new end count for nothing, though they are still there."""
    model = make_tiny(family)
    members = alone(model)
    cache = members.row_cache(2, ROOM)
    read_texts(members, cache)
    other = random_ids(1, 7, seed=77)[0].tolist()
    found = read(members, cache, [(other, 5), (other, 11)])
    for one, text, start in zip(found, TEXTS, (5, 11), strict=True):
        assert_close(one, by_its_own_cache(model, text[:start] + other, start)[start:])


@pytest.mark.parametrize("family", MODELS)
def test_some_rows_are_read_and_the_others_stay(family: str) -> None:
    model = make_tiny(family)
    members = alone(model)
    cache = members.row_cache(3, ROOM)
    text, other = TEXTS
    read(members, cache, [(text[:6], 0), (text[:8], 0), (text[:9], 0)])
    (found,) = read(members, cache, [(other[:7], 0)], first_row=1)
    assert_close(found, by_its_own_cache(model, other[:7], 7))
    rows = read(members, cache, [(text[6:9], 6), (other[7:9], 7), (text[9:10], 9)])
    for row, whole, start in zip(rows, (text, other, text), (6, 7, 9), strict=True):
        assert_close(row, by_its_own_cache(model, whole, start)[start : start + len(row)])


@pytest.mark.parametrize("family", MODELS)
def test_copied_rows(family: str) -> None:
    """Rows that change places at once; and a row of another cache."""
    model = make_tiny(family)
    members = alone(model)
    cache = members.row_cache(3, ROOM)
    text, other = TEXTS
    read(members, cache, [(text[:6], 0), (other[:8], 0)])
    cache.copy_rows([0, 1, 0], [1, 0, 2], 8)
    found = read(members, cache, [(other[8:10], 8), (text[6:9], 6), (text[6:8], 6)])
    for one, whole, start in zip(found, (other, text, text), (8, 6, 6), strict=True):
        assert_close(one, by_its_own_cache(model, whole, start)[start : start + len(one)])
    another = members.row_cache(1, 60)
    another.copy_rows([0], [0], 8, cache)
    (found,) = read(members, another, [(other[8:12], 8)])
    assert_close(found, by_its_own_cache(model, other, 8)[8:12])
    assert all(not part.layers[0].keys[:, :, 12:60].any() for part in another.caches.values())


@pytest.mark.parametrize("family", MODELS)
def test_a_cache_grows(family: str) -> None:
    model = make_tiny(family)
    members = alone(model)
    cache = members.row_cache(1, 10)
    text, other = TEXTS
    read(members, cache, [(text[:9], 0)])
    cache.lengths = [9]
    places = [layer.keys.data_ptr() for part in cache.caches.values() for layer in part.layers]
    version = cache.version
    cache.reserve(1, 10)
    assert cache.version == version
    assert [layer.keys.data_ptr() for part in cache.caches.values() for layer in part.layers] == places
    cache.reserve(2, 20)
    assert (cache.num_rows, cache.room, cache.lengths) == (2, bucket(20), [9, 0])
    assert cache.version != version
    read(members, cache, [(other[:12], 0)], first_row=1)
    found = read(members, cache, [(text[9:15], 9), (other[12:20], 12)])
    for one, whole, start in zip(found, TEXTS, (9, 12), strict=True):
        assert_close(one, by_its_own_cache(model, whole, start)[start:])
    cache.reserve(1, 1000)  # rows are not given back
    assert (cache.num_rows, cache.room, cache.lengths) == (2, bucket(1000), [9, 0])
    cache.reserve(3, 10)
    assert (cache.num_rows, len(cache.lengths), cache.room) == (4, 4, bucket(1000))


@pytest.mark.parametrize("family", MODELS)
def test_what_stands_behind_the_lengths_is_forgotten(family: str) -> None:
    """NaN that a mask hides would be NaN times zero."""
    model = make_tiny(family)
    members = alone(model)
    cache = members.row_cache(2, ROOM)
    text, other = TEXTS
    read(members, cache, [(text[:9], 0), (other[:12], 0)])
    cache.lengths = [9, 12]
    for part in cache.caches.values():
        for layer in part.layers:
            for row, length in enumerate(cache.lengths):
                layer.keys[row, :, length:] = layer.values[row, :, length:] = torch.nan
    cache.forget_behind()
    found = read(members, cache, [(text[9:11], 9), (other[12:14], 12)])
    for one, whole, start in zip(found, TEXTS, (9, 12), strict=True):
        assert_close(one, by_its_own_cache(model, whole, start)[start : start + 2])


def test_a_failed_step_counts_for_nothing() -> None:
    model = make_tiny("llama")
    members = alone(model)
    cache = members.row_cache(1, ROOM)
    text = TEXTS[0]
    read(members, cache, [(text[:9], 0)])

    def fail(*_: Any) -> None:
        raise ValueError("boom")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RunError, match=r"^one failed: ValueError: boom"):
        read(members, cache, [(TEXTS[1][9:12], 9)])
    hook.remove()
    (found,) = read(members, cache, [(text[9:], 9)])
    assert_close(found, by_its_own_cache(model, text, 9)[9:])


def test_chunks_of_a_prompt_are_the_prompt() -> None:
    model = make_tiny("gemma2")
    members = alone(model)
    cache = members.row_cache(1, ROOM)
    found = torch.cat([read(members, cache, [(TEXTS[1][at : at + 7], at)])[0] for at in range(0, 20, 7)])
    assert_close(found, by_its_own_cache(model, TEXTS[1], 20))


def test_rows_that_stand_at_the_same_place_are_written_as_one_block() -> None:
    """The same numbers as if they were scattered."""
    positions = torch.arange(4, 7).expand(2, 3)
    assert Slots.of(positions, positions, ROOM).start == 4
    assert Slots.of(positions + torch.tensor([[0], [1]]), positions, ROOM).start is None
    padded = torch.tensor([[4, 5, -1], [4, 5, 6]])
    slots = Slots.of(padded, padded, ROOM)
    assert slots.index is not None
    assert (slots.start, slots.length, slots.index[1].tolist()) == (None, 7, [[4, 5, ROOM], [4, 5, 6]])
    model = make_tiny("llama")
    members = alone(model)
    pieces = [(text[:9], 0) for text in TEXTS]
    together = read(members, members.row_cache(2, ROOM), pieces)
    scattered = read(members, members.row_cache(3, ROOM), [*pieces, (TEXTS[0][:1], 1)])[:2]
    torch.testing.assert_close(together, scattered, rtol=0, atol=1e-6)


def test_what_a_row_cache_refuses() -> None:
    members = alone(make_tiny("llama"))
    cache = members.row_cache(1, 10)
    with pytest.raises(InputError, match="position 10 of a cache with room for 10"):
        read(members, cache, [(TEXTS[0][:2], 9)])
    with pytest.raises(InputError, match="needs position_ids"):
        members.logits(Step(torch.tensor([[5]])), cache)


def test_buckets() -> None:
    assert [bucket(num) for num in (1, 256, 257, 1000, 1025)] == [SMALLEST, SMALLEST, 512, 1024, 2048]
    assert [bucket(num, 1) for num in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]


# -- a shared backbone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["launched", "replayed"])
def test_members_on_a_backbone_keep_a_block_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    """Ragged prompts, a row that goes back, rows that change places: as with two copies of the model."""
    base = save_base(tmp_path / "base", "mistral")
    pair = make_pair(base, save_adapter(base, tmp_path / "adapter"), make_model("qwen2", 3))
    found: list[list[dict[str, Tensor]]] = []
    for model in (pair.shared, pair.copies):
        members = with_graphs(model.member_set, monkeypatch) if static else model.member_set
        cache = members.row_cache(3, ROOM)
        steps = []
        for ids, positions in (
            (random_ids(2, 9, seed=1), torch.stack([torch.arange(9) - 3, torch.arange(9)]).clamp(min=-1)),
            (random_ids(2, 2, seed=2), torch.tensor([[6, 7], [9, 10]])),
            (random_ids(2, 1, seed=3), torch.tensor([[7], [10]])),
            (random_ids(3, 1, seed=4), torch.tensor([[11], [8], [8]])),
        ):
            if len(ids) == 3:
                cache.copy_rows([1, 0, 0], [0, 1, 2], 11)
            with torch.no_grad():
                logits = members.logits(Step(ids, None, positions, 0), cache)
            steps.append({role: values.clone()[positions >= 0] for role, values in logits.items()})
        found.append(steps)
    assert [part.num_blocks for part in pair.shared.member_set.row_cache(1, 9).caches.values()] == [2, 1]
    assert [part.num_blocks for part in pair.copies.member_set.row_cache(1, 9).caches.values()] == [1, 1, 1]
    for shared, copies in zip(*found, strict=True):
        assert shared.keys() == copies.keys()
        for role in shared:
            torch.testing.assert_close(shared[role], copies[role], rtol=1e-5, atol=2e-5)
