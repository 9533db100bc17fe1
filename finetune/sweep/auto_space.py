"""The space of `sweep.space=auto`: ranks, targets, bits, learning rate and packing length around a config.

Parameters that are no key of a config have names of their own; `AutoSpace.words` writes them as keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.config.keys import find
from finetune.config.overrides import quoted, read_value
from finetune.config.schema import RunConfig
from finetune.models.families import ModelFamily
from finetune.models.families.family import ATTENTION, LINEARS
from finetune.planning.static_memory import adapted_linears
from finetune.report.settings import flat
from finetune.sweep.space import Parameter, Space

TARGETS, RANK, RATE, LENGTH = "lora.target_modules", "lora.rank", "train.learning_rate", "data.max_length"
MLP_RANK, ATTENTION_BITS, MLP_BITS = "rank of MLP", "bits of attention", "bits of MLP"
# Keys that take a parameter out of the space where the command line gives them.
_FIXED_BY = {
    TARGETS: {TARGETS},
    RANK: {RANK},
    MLP_RANK: {RANK, "lora.rank_pattern"},
    ATTENTION_BITS: {"quant.int8", "quant.skip_modules"},
    MLP_BITS: {"quant.int8", "quant.skip_modules"},
    RATE: {RATE},
    LENGTH: {LENGTH, "data.packing", "train.batch_size"},
}
_TARGETS = ("[q_proj,v_proj]", f"[{','.join(ATTENTION)}]", "all-linear")
_RANKS = (4, 8, 16, 32, 64)
_MLP = LINEARS[len(ATTENTION) :]
_RATE_FACTOR = 10.0
_LENGTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_BITS = (4, 8, 16)


@dataclass(frozen=True)
class AutoSpace(Space):
    """A space around a config.

    Attributes:
        cfg: the config with the fixed overrides.
        start: the values of the config itself; None if one of them is outside the space.
    """

    cfg: RunConfig
    start: Mapping[str, str] | None

    def words(self, values: Mapping[str, str]) -> list[str]:
        """Return the overrides of a run with these values of the parameters, beside the fixed ones."""
        cfg, keys = self.cfg, dict(values)
        if (rank := keys.pop(MLP_RANK, None)) is not None:
            keys["lora.rank_pattern"] = f"{{{','.join(f'{name}:{rank}' for name in _MLP)}}}"
        if ATTENTION_BITS in keys:
            bits = {"self_attn": keys.pop(ATTENTION_BITS), "mlp": keys.pop(MLP_BITS)}
            for key, wanted in (("quant.int8", "8"), ("quant.skip_modules", "16")):
                keys[key] = f"[{','.join(kind for kind, each in bits.items() if each == wanted)}]"
        if any(parameter.key == LENGTH and not parameter.word for parameter in self.parameters):
            keys["train.batch_size"] = str(cfg.train.batch_size * cfg.data.max_length // int(keys[LENGTH]))
        return super().words(keys)


def auto_space(
    cfg: RunConfig, given: Space, given_keys: Collection[str], family: ModelFamily, lengths: Sequence[int]
) -> AutoSpace:
    """Build the space around a config.

    Args:
        cfg: with the fixed overrides.
        given: the fixed overrides, and the parameters that the user gives.
        given_keys: keys on the command line.
        family: of the model.
        lengths: packing lengths to choose from, ascending; fewer than two: the config's alone.
    """
    found = _adapters(cfg, family, given_keys)
    if cfg.quant.type == "nf4" and cfg.lora.init == "default" and not (cfg.quant.skip_modules or cfg.quant.int8):
        found |= {key: (_ordered(key, _BITS), "4") for key in (ATTENTION_BITS, MLP_BITS)}
    rate = cfg.train.learning_rate
    low, high = rate / _RATE_FACTOR, min(1.0, rate * _RATE_FACTOR)
    found[RATE] = (Parameter(RATE, "", low=low, high=high, logarithmic=True), repr(rate))
    if len(lengths) > 1:
        found[LENGTH] = (_ordered(LENGTH, lengths), str(cfg.data.max_length))
    own = {key: one for key, one in found.items() if not _FIXED_BY[key] & set(given_keys)}
    start: dict[str, str] = {key: value for key, (_, value) in own.items()}
    if (mlp := own.get(MLP_RANK)) and mlp[0].only_with and start[TARGETS] not in mlp[0].only_with[1]:
        del start[MLP_RANK]
    theirs = {parameter.key: _own_value(parameter, cfg) for parameter in given.parameters}
    whole = None if None in theirs.values() else {**start, **{key: str(value) for key, value in theirs.items()}}
    return AutoSpace(given.fixed, (*(one for one, _ in own.values()), *given.parameters), cfg, whole)


def _adapters(cfg: RunConfig, family: ModelFamily, given_keys: Collection[str]) -> dict[str, tuple[Parameter, str]]:
    """Return targets and ranks, each with the config's own value; none of them for an adapter that is continued."""
    lora = cfg.lora
    if lora.init_adapter is not None:
        return {}
    layer = (lora.layers_to_transform or [0])[0]

    def adapts_both(targets: str) -> bool:
        there = adapted_linears(family, layer, lora.model_copy(update={"target_modules": _read(targets)}))
        return bool(there & set(ATTENTION)) and bool(there & set(_MLP))

    own = next((text for text in _TARGETS if _read(text) == lora.target_modules), None)
    choices = [*_TARGETS, *([own := _text(lora.target_modules)] if own is None else [])]
    if TARGETS in given_keys:
        choices = [own]
    both = frozenset(filter(adapts_both, choices))
    ranks = sorted({*_RANKS, lora.rank})
    found = {TARGETS: (Parameter(TARGETS, "", tuple(choices)), own), RANK: (_ordered(RANK, ranks), str(lora.rank))}
    # Servers of rollouts read no pattern of ranks.
    served = cfg.reward.loss != "none" and cfg.reward.engine == "server"
    if both and not lora.rank_pattern and not served:
        only_with = None if TARGETS in given_keys else (TARGETS, both)
        found[MLP_RANK] = (replace(_ordered(MLP_RANK, ranks), only_with=only_with), str(lora.rank))
    return found


def _ordered(key: str, numbers: Sequence[int]) -> Parameter:
    return Parameter(key, "", tuple(map(str, numbers)), ordered=True)


def _read(text: str) -> Any:
    return read_value(text, find(TARGETS))


def _text(targets: list[str] | str) -> str:
    return quoted(targets) if isinstance(targets, str) else f"[{','.join(map(quoted, targets))}]"


def _own_value(parameter: Parameter, cfg: RunConfig) -> str | None:
    """Return the config's own value of a parameter; None if it is outside."""
    value = dict(flat(cfg.model_dump(mode="json"))).get(parameter.key)
    if not parameter.choices:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return repr(value) if is_number and parameter.low <= value <= parameter.high else None
    kind = find(parameter.key)
    return next((text for text in parameter.choices if str(read_value(text, kind)) == str(value)), None)


def packing_lengths(cfg: RunConfig, longest: int) -> list[int]:
    """Return lengths of sequences that all keep the rows and the tokens per step of a config.

    Args:
        longest: tokens of the longest row that is trained or held out.
    """
    data, train = cfg.data, cfg.train
    tokens, least = train.batch_size * data.max_length, max(train.world_size or 1, train.micro_batch_size or 1)
    lengths = (data.max_length * factor for factor in _LENGTH_FACTORS)
    return [
        int(length)
        for length in lengths
        if length >= longest and length.is_integer() and tokens % length == 0 and tokens // length >= least
    ]
