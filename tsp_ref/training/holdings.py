"""The table at the end of a run: what each rank held and sent, against what one process would hold."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..comm.control import gather
from ..config import Config
from .loop import Training


def model_state_bytes(config: Config) -> int:
    """Weights, gradients and both moments of a whole model: what one process holds between steps."""
    return 4 * config.num_parameters * np.dtype(config.dtype).itemsize


def gain_bytes(config: Config) -> int:
    """The part of the model state that every rank holds whole: the gains of the norms, and what belongs to them."""
    return 4 * (2 * config.num_layers + 1) * config.hidden_size * np.dtype(config.dtype).itemsize


def activation_bytes(config: Config) -> int:
    """What the forward of a whole batch keeps for its backward, in one process.

    For each token and layer: the inputs of both parts (2h), queries and the heads' output (2h), keys and values (2Ke),
    a log-sum-exp for each head (H), gate and up (2f); and for the head its input (h) and a log-sum-exp (1).
    """
    keys = config.num_kv_heads * config.head_dim
    layer = 4 * config.hidden_size + 2 * keys + config.num_heads + 2 * config.ffn_size
    per_token = config.num_layers * layer + config.hidden_size + 1
    return per_token * config.batch_size * config.seq_len * np.dtype(config.dtype).itemsize


def size(count: float) -> str:
    """A number of bytes for reading: 1.5 MB and the like, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def holdings_table(training: Training) -> Table:
    """One row a rank. Every rank must call it; only rank 0's is to be shown."""
    config, memory = training.config, training.model.memory
    messages, sent = training.comm.ledger.sums("send")
    mine = np.array([memory.peak["weights"], memory.peak["gradients"], memory.peak["optimizer"],
                     memory.model_state_peak, memory.peak["activations"], memory.peak["buffers"], messages, sent])
    one_state, one_activations, gains = model_state_bytes(config), activation_bytes(config), gain_bytes(config)
    table = Table(title="What each rank held at its peak, and sent", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("rank", "weights", "grads", "AdamW", "all three", "share", "activations", "share", "buffers",
                    "messages", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, row in enumerate(gather(training.comm, mine)):
        weights, gradients, optimizer, state, activations, buffers, count, volume = (int(value) for value in row)
        table.add_row(str(rank), size(weights), size(gradients), size(optimizer), size(state),
                      f"1/{(one_state - gains) / (state - gains):.2f}", size(activations), f"1/{one_activations / activations:.2f}",
                      size(buffers), f"{count:,}", size(volume))
    table.add_section()
    table.add_row("alone", size(one_state / 4), size(one_state / 4), size(one_state / 2), size(one_state), "1",
                  size(one_activations), "1", "", "", "")
    table.caption = (f"share: of what one process holds alone; the norms' gains, {size(gains)} with their gradients and "
                     "moments, are on every rank and left out of it")
    table.caption_justify = "left"
    return table
