"""EnsembleForImageClassification: several image classifiers, combined by a rule, as one `transformers` model.

The rules, the operations and the folder are those of language models; a row of logits is over classes, not tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ensembler import folder as folders
from ensembler.config import IMAGES, EnsembleConfig, MemberConfig
from ensembler.engine.grid import combine_members, make_combination
from ensembler.engine.model_runner import check_nan
from ensembler.errors import InputError
from ensembler.generation import FixedRule
from ensembler.vision.image_preflight import ZERO_SHOT, CheckedImages, check_images
from ensembler.vision.towers import Tower, load_model, load_towers

PixelValues = Tensor | Mapping[str, Tensor]


class EnsembleForImageClassification(folders.PushedFolder, FixedRule, PreTrainedModel):  # type: ignore[misc,unused-ignore]
    """Members combined by a rule, as one image classifier.

    Make one with `from_members` or `from_pretrained`. `classes` are the labels in the order of the logits, `towers`
    what is run: members that share their tower are in one. `alpha` may be set between calls.
    """

    config_class = EnsembleConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = True

    def __init__(self, checked: CheckedImages, towers: Sequence[Tower]) -> None:
        super().__init__(checked.config)
        self._rule = checked.config.get_rule()
        self._files = checked.files
        self.classes = checked.classes
        self.contract = checked.contract
        self.towers: Any = nn.ModuleList(towers)
        self.combination = make_combination(self.rule, self.contract, checked.config.outside)
        self.eval()

    @classmethod
    def from_members(
        cls,
        *,
        rule: str = "base-change",
        alpha: float = 1.0,
        members: Mapping[str, str | Path | MemberConfig | Mapping[str, Any]],
        **settings: Any,
    ) -> EnsembleForImageClassification:
        """Return an ensemble of `members` by role: paths, hub ids, or MemberConfigs (a `head` among their fields).

        `settings` are those of `EnsembleConfig`: the numbers of the rule, and `classes`, where no member names them or
        zero-shot members need them; `class_texts`, `templates` and `aliases`. Raises ConfigError, MemberError or
        ClassesError before any weight is loaded.
        """
        config = EnsembleConfig(task=IMAGES, rule=rule, alpha=alpha, members=dict(members), **settings)
        return cls.from_checked(check_images(config))

    @classmethod
    def from_checked(cls, checked: CheckedImages) -> EnsembleForImageClassification:
        """Load the members of a checked ensemble, those that share a tower together."""
        return cls(checked, load_towers(checked))

    @classmethod
    def from_pretrained(  # type: ignore[override,unused-ignore]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: EnsembleConfig | None = None,
        alpha: float | None = None,
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> EnsembleForImageClassification:
        """Return the ensemble of a folder (or hub id of one); `alpha` and `dtype` override the folder's.

        The hub's options (`revision`, `token` ...) say which folder. Raises as `from_members`.
        """
        options = {name: value for name, value in options.items() if value is not False}  # as Auto classes give them
        config = folders.load(pretrained_model_name_or_path, config, dtype=dtype, options={**options, "alpha": alpha})
        return cls.from_checked(check_images(config))

    def save_pretrained(  # type: ignore[override,unused-ignore]
        self,
        save_directory: str | Path,
        *,
        copy_members: bool = False,
        overwrite: bool = False,
        max_shard_size: int | str | None = None,
        **options: Any,
    ) -> None:
        """Write the folder: config.json; members and heads are referenced, or copied too with `copy_members`.

        `max_shard_size`: of their weights files, as in `transformers`, whose other options are refused unless they ask
        for nothing. Raises OutputError if the folder holds a model, unless `overwrite`.
        """
        folders.check_save_options(options)
        copies = {}
        for role, member in self._files.items() if copy_members else ():
            processors = [member.processor]
            if member.kind == ZERO_SHOT:  # its head is made with the tokenizer
                name, revision = member.config.model, member.config.revision
                processors.append(AutoTokenizer.from_pretrained(name, revision=revision))
            copies[role] = folders.Copy(partial(load_model, member), tuple(processors), max_shard_size)
        folders.write(self.config, Path(save_directory), copies=copies, overwrite=overwrite)

    @property
    def alpha(self) -> float:
        """The strength of the log-ratio."""
        return float(self.config.alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.config.alpha = self.rule.check_alpha(value)

    def prepare(self, images: Iterable[Any]) -> dict[str, Tensor]:
        """Return images of Pillow as every member's own pixel values (rows, channels, height, width), by role.

        Members that share a tower have the same tensor. An iterator may decode each image when its turn comes.
        """
        rows = [[tower.prepare(image) for tower in self.towers] for image in images]
        columns = map(torch.cat, zip(*rows, strict=True))
        return {role: values for tower, values in zip(self.towers, columns, strict=bool(rows)) for role in tower.roles}

    def forward(
        self, pixel_values: PixelValues | None = None, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput:
        """Run all members and return combined logits (rows, classes) fp32.

        `pixel_values`: by role, as `prepare` returns them; or one tensor for members that want the same. `labels`
        (rows,) int64 add the loss. Raises RunError or LogitsError with the role that failed.
        """
        if pixel_values is None:
            raise InputError("an ensemble's forward needs pixel_values, by role; prepare(images) makes them")
        logits = self.combine(self.member_logits(pixel_values))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.to(logits.device))
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    def member_logits(self, pixel_values: PixelValues) -> dict[str, Tensor]:
        """Return every member's own logits (rows, classes) by role, on its device; a shared tower is run once."""
        if isinstance(pixel_values, Tensor):
            pixel_values = dict.fromkeys(self.rule.roles, pixel_values)
        logits: dict[str, Tensor] = {}
        for tower in self.towers:
            given = [pixel_values[role] for role in tower.roles if role in pixel_values]
            if not given:
                raise InputError(
                    f"pixel_values has nothing for {' or '.join(tower.roles)}; prepare(images) makes them all"
                )
            logits |= tower(given[0])
        check_nan(logits)
        return logits

    def combine(self, logits: Mapping[str, Tensor], alpha: float | Tensor | None = None) -> Tensor:
        """Return the combination of member logits (rows, classes) by the rule, fp32.

        `alpha`: a number, or one for each row; the ensemble's, if it is not given.
        """
        return combine_members(logits, self.combination, self.alpha if alpha is None else alpha, self.contract.widths)


AutoModelForImageClassification.register(EnsembleConfig, EnsembleForImageClassification, exist_ok=True)
