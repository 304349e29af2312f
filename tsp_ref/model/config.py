"""What a model is: sizes, grid and training settings, their presets, and every check on them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..ops.rope_scaling import RopeScaling
from .presets import PLANNING_ONLY as PLANNING_ONLY
from .presets import PRESETS as PRESETS

TYPES = {"int": int, "float": float, "bool": bool, "str": str}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}


def _field(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


MULTIPLES = (("hidden_size", "num_heads"), ("num_heads", "num_kv_heads"), ("num_kv_heads", "blocks"),
             ("ffn_size", "blocks"), ("seq_len", "tiles"))
"""(field, field that it must be a multiple of); the first only where the size of a head is not given."""


@dataclass(frozen=True)
class Config:
    """One validated description of a model, its grid and its training. Any invalid value raises `UserError`.

    A head_dim of 0 is replaced by the size that it stands for, so that equal models are equal configurations: where
    `dataclasses.replace` changes hidden_size or num_heads, it needs head_dim=0 again.
    """

    vocab_size: int = _field(256, "V, vocabulary; 256 is bytes")
    hidden_size: int = _field(128, "h, size of a token's vector")
    num_layers: int = _field(4, "L, layers")
    num_heads: int = _field(16, "H, query heads")
    num_kv_heads: int = _field(8, "K, key/value heads (fewer than H: grouped-query attention)")
    head_dim: int = _field(0, "e, size of a head; 0: hidden_size / num_heads")
    ffn_size: int = _field(384, "f, width of the gated feed-forward part")
    seq_len: int = _field(256, "S, tokens in a sequence")
    rope_theta: float = _field(10000.0, "base of the rotary embedding's wavelengths")
    rope_factor: float = _field(1.0, "Llama 3's rope scaling: slow frequencies are divided by it; 1: none")
    rope_low_freq_factor: float = _field(1.0, "slow is what turns less often than this in the original length")
    rope_high_freq_factor: float = _field(4.0, "what turns more often than this is not scaled")
    rope_original_length: int = _field(8192, "tokens that the model was first trained on")
    norm_eps: float = _field(1e-5, "added to the mean square in RMSNorm")
    qkv_bias: bool = _field(False, "queries, keys and values have biases (Qwen2)")
    qk_norm: bool = _field(False, "an RMSNorm of each head of the queries and keys (Qwen3)")
    tied_head: bool = _field(False, "the head is the embedding table")
    dtype: str = _field("float32", "float32 or float64, for every floating array")

    blocks: int = _field(8, "G, blocks that each weight matrix is cut in; at most G ranks share the weights")
    tiles: int = _field(16, "T, tiles that each sequence is cut in; at most T ranks share the tokens")

    batch_size: int = _field(4, "B, sequences in a step")
    steps: int = _field(100, "optimizer steps")
    learning_rate: float = _field(6e-3, "peak of the schedule")
    final_rate: float = _field(0.1, "learning rate at the last step, as a part of the peak")
    warmup_steps: int = _field(10, "steps of linear warm-up")
    weight_decay: float = _field(0.1, "for matrices; gains are not decayed")
    beta1: float = _field(0.9, "AdamW's decay of the first moment")
    beta2: float = _field(0.95, "AdamW's decay of the second moment")
    adam_eps: float = _field(1e-8, "AdamW's epsilon")
    clip_norm: float = _field(1.0, "largest global gradient norm; 0 turns clipping off")
    validation_batches: int = _field(2, "batches of held-out text for the validation loss")
    seed: int = _field(0, "of the initial weights and of the batches")

    @property
    def tile_len(self) -> int:
        """s, the tokens of a tile."""
        return self.seq_len // self.tiles

    @property
    def num_tokens(self) -> int:
        """B·S, the tokens of a step."""
        return self.batch_size * self.seq_len

    @property
    def group_size(self) -> int:
        """g, the query heads that share a key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_heads_per_block(self) -> int:
        """K/G."""
        return self.num_kv_heads // self.blocks

    @property
    def rows_per_block(self) -> int:
        """V/G, rounded up: the rows of a block of the vocabulary, those of no token at the end of the last included."""
        return _rows_per_block(self.vocab_size, self.blocks)

    def tokens_in_block(self, block: int) -> int:
        """How many of a block's rows of the vocabulary are a token's: the first; all of them but in the last block."""
        return min(self.rows_per_block, self.vocab_size - block * self.rows_per_block)

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """The scaling of the rotary embedding, if there is one."""
        if self.rope_factor == 1:
            return None
        return RopeScaling(self.rope_factor, self.rope_low_freq_factor, self.rope_high_freq_factor,
                           self.rope_original_length)

    @property
    def max_ranks(self) -> int:
        """The largest N for TSP, where every rank needs a block and a tile."""
        return min(self.blocks, self.tiles)

    @property
    def num_parameters(self) -> int:
        """All weights, gains included; a tied head counts once, and what only fills up blocks and rows not at all."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * query + 2 * key + 3 * self.ffn_size + 2)
        layer += (query + 2 * key if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_head else 2)
        return self.num_layers * layer + tables + self.hidden_size

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            kind, value = TYPES[str(item.type)], getattr(self, item.name)
            # A whole number will do for a float, but True, which Python counts as one, will not do for a size.
            fits = type(value) is kind or (kind is float and type(value) is int)
            _require(fits, self, item.name, f"use {KINDS[str(item.type)]}")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "seq_len",
                     "rope_original_length", "blocks", "tiles", "batch_size", "steps", "validation_batches"):
            _require(getattr(self, name) >= 1, self, name, "use a whole number of at least 1")
        for name in ("head_dim", "warmup_steps", "seed"):
            _require(getattr(self, name) >= 0, self, name, "use 0 or more")
        for name in ("rope_theta", "rope_low_freq_factor", "norm_eps", "adam_eps", "learning_rate"):
            _require(0 < getattr(self, name) < float("inf"), self, name, "use a finite number above 0")
        _require(1 <= self.rope_factor < float("inf"), self, "rope_factor", "use a finite number of at least 1")
        _require(self.rope_low_freq_factor < self.rope_high_freq_factor < float("inf"), self, "rope_high_freq_factor",
                 f"use a finite number above rope_low_freq_factor={self.rope_low_freq_factor}")
        for name in ("weight_decay", "clip_norm"):
            _require(0 <= getattr(self, name) < float("inf"), self, name, "use a finite number, 0 or more")
        _require(0 <= self.final_rate <= 1, self, "final_rate", "use a number from 0 to 1")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, self, name, "use a number from 0 up to, not including, 1")
        _require(self.dtype in ("float32", "float64"), self, "dtype", "use float32 or float64")
        self._require_sizes_that_fit()
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)

    def _require_sizes_that_fit(self) -> None:
        for name, divisor in MULTIPLES:
            if name != "hidden_size" or self.head_dim == 0:
                _require_multiple(self, name, divisor)
        if not _vocabulary_fits(self.vocab_size, self.blocks):
            fitting = _nearest_fits(dataclasses.asdict(self), "vocab_size")
            _require(False, self, "vocab_size",
                     f"cut in blocks={self.blocks} of {self.rows_per_block} rows, it leaves the last without a token; "
                     f"use {fitting} for vocab_size, or fewer blocks")
        turned = "and the rotary embedding turns them in pairs"
        _require(self.head_dim % 2 == 0, self, "head_dim", f"a head has so many entries, {turned}: use an even number")
        found = self.hidden_size // self.num_heads
        _require(self.head_dim > 0 or found % 2 == 0, self, "hidden_size",
                 f"a head has hidden_size / num_heads = {found} entries, {turned}: use a multiple of "
                 f"{2 * self.num_heads}, or give head_dim")


def _require(holds: bool, config: Config, name: str, remedy: str) -> None:
    if not holds:
        raise UserError(f"{name}={getattr(config, name)} is not valid: {remedy}")


def _require_multiple(config: Config, name: str, divisor_name: str) -> None:
    value, divisor = getattr(config, name), getattr(config, divisor_name)
    if value % divisor:
        values = dataclasses.asdict(config)
        choices, others = _nearest_fits(values, name), _nearest_fits(values, divisor_name)
        remedy = f"{choices} for {name}, or another {divisor_name}" if choices else f"{others} for {divisor_name}"
        if (name, divisor_name) == ("num_kv_heads", "blocks"):
            remedy += KEPT_WHOLE
        raise UserError(f"{name}={value} is not a multiple of {divisor_name}={divisor}: use {remedy}")


KEPT_WHOLE = ("; a key/value head is in one block, whole. Only ranks that share the weights need a block each: those "
              "of --schedule sp, and of tp+sp with one rank for weights (--mesh 1xN), share tokens alone")


def _nearest_fits(values: dict[str, Any], name: str) -> str:
    """The values next below and above a field's with which all sizes would fit each other: "96 or 128", or nothing."""
    value = values[name]
    nearest = [next((number for number in numbers if _sizes_fit({**values, name: number})), None)
               for numbers in (range(value, 0, -1), range(value + 1, 4 * value + 64))]
    return " or ".join(str(number) for number in nearest if number is not None)


def _sizes_fit(values: dict[str, Any]) -> bool:
    given = values["head_dim"] > 0
    head_dim = values["head_dim"] if given else values["hidden_size"] // values["num_heads"]
    rules = MULTIPLES[1:] if given else MULTIPLES
    return head_dim % 2 == 0 and _vocabulary_fits(values["vocab_size"], values["blocks"]) and all(
        values[name] % values[divisor] == 0 for name, divisor in rules)


def _rows_per_block(vocab_size: int, blocks: int) -> int:
    return -(-vocab_size // blocks)


def _vocabulary_fits(vocab_size: int, blocks: int) -> bool:
    """Whether the last block holds a token too."""
    return (blocks - 1) * _rows_per_block(vocab_size, blocks) < vocab_size


def make_config(preset: str = "small", settings: list[str] | None = None, **overrides: Any) -> Config:
    """The preset with `settings` ("field=value" texts) and then `overrides` laid over it."""
    if preset not in PRESETS:
        raise UserError(f"preset={preset} is unknown: use one of {', '.join(PRESETS)}")
    chosen = dict(PRESETS[preset])
    for setting in settings or []:
        name, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"--set {setting} is not of the form field=value, for example hidden_size=64")
        chosen[name] = _parse(name, text)
    return Config(**{**chosen, **overrides})


def _parse(name: str, text: str) -> Any:
    """The value of a field from its text, by the type that the field is declared with."""
    types = {item.name: item.type for item in dataclasses.fields(Config)}
    if name not in types:
        raise UserError(f"field {name} is unknown: use one of {', '.join(types)}")
    try:
        if types[name] == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return TYPES[str(types[name])](text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text} is not valid: use {KINDS[str(types[name])]}") from None
