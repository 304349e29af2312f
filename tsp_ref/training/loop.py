"""Training: one optimizer step after another, on whatever strategy it is given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..accounting.phase import phase
from ..arrays import Namespace
from ..backends.host import Backend
from ..comm.communicator import Communicator
from ..errors import AgreedError
from ..model.activations import Saved
from ..model.config import Config
from ..model.model import Model
from ..model.parameters import Parameters, initial_parameters, zero_parameters
from .data import TRAINING, VALIDATION, Text, batch
from .optimizer import AdamW, clip_factor, learning_rate
from .strategy import Plan, choose_strategy


@dataclass(frozen=True)
class StepReport:
    """What a step did. Steps count from 1; loss in nats per token; norm before clipping."""

    step: int
    loss: float
    norm: float
    learning_rate: float


class Training:
    """The state of a run on one rank: weights, gradients, optimizer, all losses so far."""

    def __init__(
        self, config: Config, comm: Communicator, plan: Plan, text: Text, library: Namespace | Backend
    ) -> None:
        self.config = config
        self.comm = comm
        self.plan = plan
        self.text = text
        self.strategy = choose_strategy(plan, comm, config, library)
        self.model = self.strategy.model
        self.weights = initial_parameters(self.model)
        self.gradients = zero_parameters(self.model, "gradients")
        self.optimizer = AdamW(self.model)
        self.losses: list[float] = []
        self.validation_losses: list[float] = []
        self.steps_done = 0
        self.kept_bytes = 0  # activations held between a forward and its backward

    def forward(self) -> tuple[float, Saved]:
        """The forward of the next batch."""
        tokens, targets = batch(self.model, self.text, TRAINING, self.steps_done)
        loss, saved = self.strategy.forward(self.weights, tokens, targets)
        self.losses.append(loss)
        self.kept_bytes = self.model.memory.held["activations"]
        return loss, saved

    def update(self) -> float:
        """Clip, and let the optimizer take its step; the gradients' norm before clipping."""
        norm = self.strategy.gradient_norm(self.gradients)
        take_step(self.comm, self.model, self.optimizer, self.weights, self.gradients, self.steps_done, norm)
        self.steps_done += 1
        return norm

    def step(self) -> StepReport:
        """Forward, backward, update. A loss or a norm that is not finite ends the run."""
        number = self.steps_done
        loss, saved = self.forward()
        self.require_finite("loss", loss)
        self.strategy.backward(saved, self.weights, self.gradients)
        norm = self.update()
        self.require_finite("gradient norm", norm)
        return StepReport(number + 1, loss, norm, learning_rate(self.config, number))

    def validate(self) -> float:
        """The mean loss over the held-out batches. One that is not finite ends the run."""
        total = 0.0
        for number in range(self.config.validation_batches):
            tokens, targets = batch(self.model, self.text, VALIDATION, number)
            total += self.strategy.forward(self.weights, tokens, targets)[0]
        loss = total / self.config.validation_batches
        self.require_finite("validation loss", loss)
        self.validation_losses.append(loss)
        return loss

    def require_finite(self, what: str, number: float) -> None:
        """An `AgreedError` for a loss or a norm, which all ranks see alike, that is infinite or not a number."""
        if not math.isfinite(number):
            raise AgreedError(f"{what}={number} at step {len(self.losses)} is not finite: lower learning_rate (now "
                              f"{self.config.learning_rate:g}), or raise warmup_steps (now {self.config.warmup_steps})")


@phase("optimizer", "backward")
def take_step(
    comm: Communicator, model: Model, optimizer: AdamW, weights: Parameters, gradients: Parameters, step: int,
    norm: float
) -> None:
    """Let the optimizer change the weights, with the gradients clipped to their norm."""
    optimizer.update(weights, gradients, step, clip_factor(model.config, norm))
