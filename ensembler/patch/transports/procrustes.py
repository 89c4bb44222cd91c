"""A LoRA for a base of other widths or depth, by orthogonal maps between the activations of the two bases.

Theseus (Rinaldi et al., ICML 2026, arXiv 2602.12952) matches what an update does to activations. Of each module the old
base gives inputs X and outputs Y of some texts, the new base X′ and Y′ of the same. With the maps

    P_in = argmin ‖X′ − X Pᵀ‖,  P_out = argmin ‖Y′ − Y Pᵀ‖  over semi-orthogonal P (new width, old width)

(eq. 5 of v1; of the SVD X′ᵀ X = U S Vᵀ the paper takes U Vᵀ, which is the minimum where no width shrinks), the update
becomes Δ′ = P_out Δ P_inᵀ (eq. 10, with the transposes that its shapes need), which keeps its rank, and its norm where
no width shrinks. BiCo (Son et al., arXiv 2605.28444) takes gradients for P_out; here both maps are of activations, so
that texts need no labels. From BiCo is the matching of layers by relative depth: layer j of the new base is given what
layer round(j (L − 1) / (L′ − 1)) of the old one has.

Implemented here and in neither paper: directions that no text reaches (outputs of a module that widens, or fewer tokens
than widths) are mapped by the orthogonal map nearest to the identity. Attention heads are not matched one by one, and
activations are not centred.

Needs texts that both tokenizers split alike. Memory is both models in fp32 and 4 GiB of activations: inputs and outputs
of some modules at a time. Cost: a forward pass of both bases on all texts for each such group of modules, and an SVD in
fp64 for each pair of spaces, cubic in their widths.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensembler.errors import ConfigError, MemberError, PatchError, PromptError
from ensembler.files import one_line
from ensembler.patch.addition import WeightUpdate
from ensembler.patch.formats import Patch
from ensembler.patch.model_layout import layout_of
from ensembler.patch.patch_plan import PatchPlan
from ensembler.patch.transports.transport import (
    Calibration,
    Progress,
    Sources,
    Transport,
    check_plain,
    loaded_names,
    silent,
)
from ensembler.safetensors_files import read_model

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
MOST_BYTES = 4 * 2**30  # of activations in memory
_NOISE = 1e-12  # of the largest singular value: fp32 activations leave 1e-14 in directions that they do not reach


def orthogonal_map(old: Tensor, new: Tensor) -> Tensor:
    """Return the semi-orthogonal P (new width, old width) in fp64 that maximises ⟨new, old Pᵀ⟩.

    It minimises ‖new − old Pᵀ‖_F as well, unless the width shrinks: ‖old Pᵀ‖ then depends on P.
    `old` and `new` are activations of the same tokens, (tokens, width) each. Directions that they do not reach are
    mapped by the semi-orthogonal map between them that is nearest to the identity.
    """
    left, values, right = torch.linalg.svd(new.double().T @ old.double())
    rank = int((values > _NOISE * values.max()).sum()) if values.numel() else 0
    reached: Tensor = left[:, :rank] @ right[:rank]
    left_rest, right_rest = left[:, rank:], right[rank:]
    if not left_rest.numel() or not right_rest.numel():
        return reached
    identity = torch.eye(new.shape[1], old.shape[1], dtype=torch.float64)
    first, _, last = torch.linalg.svd(left_rest.T @ identity @ right_rest.T, full_matrices=False)
    return reached.add_(left_rest @ first @ last @ right_rest)


def matched_layer(layer: int, num_new: int, num_old: int) -> int:
    """Return the layer of the old base at the relative depth of a layer of the new one (BiCo)."""
    return round(layer * (num_old - 1) / (num_new - 1)) if num_new > 1 else 0


@dataclass(frozen=True)
class ModuleMap:
    """The maps of one module: P_out (new rows, old rows) and P_in (new columns, old columns).

    `module`: its name in the new base when that is loaded. `residual`: ‖X′ − X Pᵀ‖ / ‖X′‖, the larger of both.
    """

    module: str
    out: Tensor
    into: Tensor
    residual: float


@dataclass(frozen=True)
class Activations:
    """Inputs and outputs of modules by name: a tensor (tokens, width) for each text."""

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Procrustes(Transport):
    """Carry updates of the old base's modules to those of a new base, of any width and depth.

    `matched`: the tensor of the old base for each tensor of the new one; `maps` by the new tensor.
    """

    matched: Mapping[str, str]
    maps: Mapping[str, ModuleMap]
    texts: Calibration
    num_tokens: int

    name = "procrustes"
    needs = ("new", "data")

    @classmethod
    def check(cls, plan: PatchPlan, sources: Sources) -> None:
        """Check a plan of the patch on its own base; raise PatchError where nothing of it can be carried."""
        check_plain(plan, cls.name)
        read_model(_new(sources))
        if not any(patch.low_rank for patch in plan.patches):
            raise PatchError(f"{plan.patches[0].folder} holds no LoRA of a matrix, which procrustes carries alone")

    @classmethod
    def prepare(cls, plan: PatchPlan, sources: Sources, progress: Progress = silent) -> Self:
        """Run both bases on the texts and find the maps. `plan` is that of the patch on its own base."""
        old_folder, new_folder, texts = plan.model.folder, _new(sources), _data(sources)
        ids = _shared_ids(texts, old_folder, new_folder)
        old, new = _load(old_folder), _load(new_folder)
        matches = _match(plan, old, new)
        num_tokens = sum(map(len, ids))
        groups = _groups(matches, old, new, num_tokens)
        maps: dict[str, ModuleMap] = {}
        with progress(2 * len(ids) * len(groups) + len(matches), "activations and maps") as advance:
            for group in groups:
                before = _activations(old, {match.old_module for match in group}, ids, advance)
                after = _activations(new, {match.new_module for match in group}, ids, advance)
                maps |= _maps(group, before, after, advance)
        pairs = {match.new_tensor: match.old_tensor for match in matches}
        return cls(pairs, maps, texts, num_tokens)

    def apply(self, name: str, update: WeightUpdate) -> WeightUpdate:
        """Return Δ′ = P_out Δ P_inᵀ for a tensor of the new base, from the factors of its match in the old one."""
        return WeightUpdate(*self.factors(name, update))

    def factors(self, name: str, update: WeightUpdate) -> tuple[Tensor, Tensor]:
        """Return (new rows, r) and (r, new columns) whose product is Δ′, in fp32."""
        left, right = _factors(update)
        found = self.maps[name]
        return (found.out @ left.double()).float(), (right.double() @ found.into.T).float()

    @property
    def notes(self) -> tuple[str, ...]:
        """Say from which texts the maps are, how well they fit, and whether the texts are too few to tell that."""
        residual = median(found.residual for found in self.maps.values())
        notes: tuple[str, ...] = (
            f"transport procrustes: {len(self.maps):,} modules mapped by {self.num_tokens:,} tokens of "
            f"{self.texts.said}; of the new activations the maps leave "
            f"{100 * residual:.0f} % unexplained (‖X′ − X Pᵀ‖ / ‖X′‖, median)",
        )
        widest = max(size for found in self.maps.values() for size in (*found.out.shape, *found.into.shape))
        if self.num_tokens < widest:
            notes += (
                f"transport procrustes: {self.num_tokens:,} tokens cannot reach all directions of the widest layer "
                f"({widest:,}), and the rest is mapped without evidence; give more texts",
            )
        return notes


@dataclass(frozen=True)
class _Match:
    """A module of the new base and that of the old one whose update it is given, with their tensors on disk."""

    new_module: str
    new_tensor: str
    old_module: str
    old_tensor: str


def carried_names(patch: Patch) -> list[str]:
    """Return the tensors of a patch that can be carried: LoRAs of matrices in the layers of the decoder."""
    return [name for name, factors in patch.low_rank.items() if _LAYER.search(name) and not factors.is_embedding]


def left_out(patch: Patch) -> list[str]:
    """Return the tensors of a patch that cannot be carried: norms, biases, embeddings and the head."""
    return sorted(patch.names - set(carried_names(patch)))


def _match(plan: PatchPlan, old: Any, new: Any) -> list[_Match]:
    """Return the modules of the new base that are given an update. Raises PatchError for another architecture."""
    names = dict.fromkeys(name for patch in plan.patches for name in carried_names(patch))
    if not names:
        raise PatchError(f"{plan.patches[0].folder} has no LoRA in the layers of {plan.model.folder}; nothing to carry")
    old_loaded = loaded_names(layout_of(old, plan.model.tensors))
    to_disk = layout_of(new, read_model(Path(new.config.name_or_path)).tensors).stored
    num_old, num_new = (model.config.get_text_config(decoder=True).num_hidden_layers for model in (old, new))
    by_layer: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        if name not in old_loaded:
            raise PatchError(f"{name} in {plan.model.folder} is no module of its own when the model is loaded")
        found = _LAYER.search(name)
        assert found is not None
        by_layer[int(found[0])].append((old_loaded[name].removesuffix(".weight"), name))
    new_modules = dict(new.named_modules())
    matches = []
    for layer in range(num_new):
        for old_module, old_tensor in by_layer[matched_layer(layer, num_new, num_old)]:
            module = _LAYER.sub(str(layer), old_module, count=1)
            pair = (old.get_submodule(old_module), new_modules.get(module))
            if not all(isinstance(each, nn.Linear) for each in pair) or f"{module}.weight" not in to_disk:
                raise PatchError(
                    f"{plan.patches[0].folder} changes {old_module}, and {new.config.name_or_path} has no linear layer "
                    f"{module}; procrustes needs two bases of one architecture, of any widths and depths"
                )
            matches.append(_Match(module, to_disk[f"{module}.weight"], old_module, old_tensor))
    return matches


def _groups(matches: Sequence[_Match], old: Any, new: Any, num_tokens: int) -> list[list[_Match]]:
    """Return the modules in groups whose inputs and outputs are in memory together, in their order."""
    groups: list[list[_Match]] = [[]]
    total = 0
    for match in matches:
        weights = old.get_submodule(match.old_module).weight, new.get_submodule(match.new_module).weight
        num_bytes = 4 * num_tokens * sum(sum(weight.shape) for weight in weights)
        if groups[-1] and total + num_bytes > MOST_BYTES:
            groups.append([])
            total = 0
        groups[-1].append(match)
        total += num_bytes
    return groups


@torch.inference_mode()
def _activations(
    model: Any, modules: set[str], texts: Sequence[Sequence[int]], advance: Callable[[int], None]
) -> Activations:
    """Return inputs and outputs of some modules on all texts; those that modules share are one tensor in memory."""
    found = Activations()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.inputs[name].append(inputs[0].reshape(-1, inputs[0].shape[-1]))
            found.outputs[name].append(output.reshape(-1, output.shape[-1]))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in sorted(modules)]
    for ids in texts:
        model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1)
        advance(1)
    for handle in handles:
        handle.remove()
    return found


def _maps(
    matches: Sequence[_Match], before: Activations, after: Activations, advance: Callable[[int], None]
) -> dict[str, ModuleMap]:
    """Return the maps of all modules; one pair of spaces that several share is solved once."""
    solved: dict[tuple[int, int], tuple[Tensor, float]] = {}

    def solve(old: list[Tensor], new: list[Tensor]) -> tuple[Tensor, float]:
        key = (old[0].data_ptr(), new[0].data_ptr())
        if key not in solved:
            first, second = torch.cat(old).double(), torch.cat(new).double()
            found = orthogonal_map(first, second)
            rest = torch.linalg.vector_norm(second - first @ found.T) / torch.linalg.vector_norm(second)
            solved[key] = found, float(rest)
        return solved[key]

    maps = {}
    for match in matches:
        seen = [sum(map(len, each)) for each in (before.inputs[match.old_module], after.inputs[match.new_module])]
        if seen[0] != seen[1] or not seen[0]:
            raise PatchError(
                f"{match.new_module} sees {seen[1]:,} tokens where {match.old_module} sees {seen[0]:,}; procrustes "
                "needs layers that see all tokens, not experts"
            )
        into, in_rest = solve(before.inputs[match.old_module], after.inputs[match.new_module])
        out, out_rest = solve(before.outputs[match.old_module], after.outputs[match.new_module])
        maps[match.new_tensor] = ModuleMap(match.new_module, out, into, max(in_rest, out_rest))
        advance(1)
    return maps


def _factors(update: WeightUpdate) -> tuple[Tensor, Tensor]:
    """Return (rows, r) and (r, columns) whose product is the low-rank part of an update."""
    assert update.left is not None
    assert update.right is not None
    return update.left, update.right


def _shared_ids(texts: Calibration, old: Path, new: Path) -> list[tuple[int, ...]]:
    """Return the tokens of each text, cut to the shorter context; raise PromptError where the bases split one apart."""
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (old, new)]
    lengths = [read_model(folder).config.get("max_position_embeddings") for folder in (old, new)]
    longest = min((length for length in lengths if length), default=None)
    found = []
    for first, second in zip(*(texts.encode(tokenizer) for tokenizer in tokenizers), strict=True):
        if first.prompt != second.prompt:
            raise PromptError(
                f"{first.source}: {old} and {new} split it into different tokens; procrustes needs two bases with one "
                "tokenizer"
            )
        if first.prompt:
            found.append(first.prompt[:longest])
    if not found:
        raise PromptError(f"{texts.file} holds no text of one token or more; give some thousand tokens")
    return found


def _load(folder: Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # transformers raises what it likes for a model that it cannot load
        raise MemberError(f"{folder} cannot be loaded: {one_line(error)}") from error


def _new(sources: Sources) -> Path:
    if sources.new is None:
        raise ConfigError("procrustes needs the new base; give --to")
    return sources.new


def _data(sources: Sources) -> Calibration:
    if sources.data is None:
        raise ConfigError("procrustes needs texts; give --texts FILE")
    return sources.data
