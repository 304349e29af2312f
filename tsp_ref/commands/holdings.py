"""The table at the end of a run: what each rank held and sent, against what one process would hold."""

from __future__ import annotations

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..comm.control import ControlTag, all_gather
from ..formulas.memory import activation_bytes, gain_bytes, model_state_bytes
from ..training.loop import Training


def short(count: float) -> str:
    """A number of bytes for reading: 1.5M for one and a half million, and the like."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.0f}" if unit == "" else f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.4g}T"


def _activations(training: Training) -> int:
    """What one process would keep of a batch."""
    return activation_bytes(training.config, recompute=training.plan.recompute)


def holdings_table(training: Training) -> Table:
    """One row a rank. Every rank must call it; only rank 0's is to be shown."""
    config, memory, ledger = training.config, training.model.memory, training.comm.ledger
    one_state, one_activations, gains = model_state_bytes(config), _activations(training), gain_bytes(config)
    control = ledger.sums("send", ControlTag.CONTROL.name)
    messages, sent = (total - part for total, part in zip(ledger.sums("send"), control))
    mine = np.array([memory.peak["weights"], memory.peak["gradients"], memory.peak["optimizer"],
                     memory.model_state_peak, training.kept_bytes, memory.peak["buffers"], sent])
    table = Table(title="What each rank held at its peak, and sent, in bytes", title_justify="left", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("rank", "weights", "grads", "AdamW", "sum", "share", "activations", "share", "buffers", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rank, row in enumerate(all_gather(training.comm, mine)):
        weights, gradients, optimizer, state, activations, buffers, volume = (int(value) for value in row)
        table.add_row(str(rank), short(weights), short(gradients), short(optimizer), short(state),
                      f"1/{(one_state - gains) / (state - gains):.2f}", short(activations),
                      f"1/{one_activations / activations:.2f}", short(buffers), short(volume))
    table.add_section()
    table.add_row("alone", short(one_state / 4), short(one_state / 4), short(one_state / 2), short(one_state), "1",
                  short(one_activations), "1", "", "")
    table.caption = (f"sum: the largest that weights, gradients and moments were together. activations: kept between "
                     f"forward and backward. share: of what one process holds alone; left out are the norms' gains, "
                     f"{short(gains)} with their gradients and moments, which every rank holds. sent: in all steps and "
                     f"the validation; rank 0 in {messages:,} messages.")
    table.caption_justify = "left"
    return table
