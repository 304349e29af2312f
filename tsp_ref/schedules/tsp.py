"""TSP: tensor and sequence parallelism folded on one axis. Every rank holds 1/N of the weights and 1/N of the tokens.

Weights come to the tokens: attention blocks are broadcast by each owner in turn, MLP and vocabulary blocks go round a
ring, and each rank applies every block to its own tokens. Only keys and values cross between tokens. Gradients of
weights go straight home to the blocks' owners. The forward of attention and MLP follows the paper (arXiv 2604.26294) as
its readers describe its attention algorithm and its ring; the backward, the embedding, the head, the order of every
sum, and that everything travels block by block, are ours.

What travels does so under the work on something else: the next blocks' weights under this one's, the first of the next
part's under the end of this part; a block's keys and values under the work on the two blocks before; gradients on their
way home under the next blocks' backward, and the last of a part under the next part. So it is posted early and waited
for late, and only a few blocks are under way. Messages share a link, one after the other: so what is needed sooner is
posted sooner, and a part lets the next part's weights set off only when all of its own have (`follow`).

Between layers a rank holds its 1/N of weights, gradients, optimizer state and token activations. Within a part it also
holds, counted as `buffers` where they are received and as `working` where they are made:

- weights: the block in use (three in attention) and those under way, of this part and of the next;
- keys and values of one block's heads for the whole sequence, in the order of the text, and as they arrive those of the
  next two; in the backward the pieces of their gradients on their way home;
- gradients of a few blocks that leave or arrive, and the pieces of its own blocks that wait for the piece beside them,
  of this part and of the one before.

Read beside `reference.single`: the same functions in the same order; what differs is the messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from ..accounting.phase import phase
from ..arrays import Array, Tiles
from ..comm.communicator import Communicator
from ..comm.request import Request
from ..grid.grid import Place, folded
from ..grid.tree import Tree
from ..model.activations import AttentionSaved, HeadSaved, MlpSaved, Saved
from ..model.model import Model
from ..model.parameters import Parameters, attention_views, mlp_views
from ..model.tilewise import add_residual, forget, normalise, normalise_backward, squares, totals
from ..ops.attention import (
    attend_backward,
    attend_forward,
    out_backward,
    out_backward_weight,
    out_forward,
    qkv_backward,
    qkv_forward,
)
from ..ops.embedding import embed_backward, embed_forward
from ..ops.loss import logits_backward, logits_forward, merge_triples, token_losses
from ..ops.mlp import swiglu_backward, swiglu_forward
from .collectives import (
    AHEAD,
    Ahead,
    GatherKeysValues,
    ReduceToOwner,
    ScatterKeysValues,
    all_reduce,
    finish_all,
    in_turn,
    own_last,
    put_off,
    turn,
    when_own_is_last,
)
from .tags import Tag


def place(comm: Communicator) -> tuple[Place, Place]:
    """Where this rank stands on the axis of weights and on that of tokens: both are folded on the same ranks."""
    return folded(comm.rank, comm.size)


def owned(comm: Communicator, model: Model) -> list[range]:
    """Each rank's blocks."""
    return [model.grid.blocks_of(rank) for rank in range(comm.size)]


class Coming:
    """The blocks of a tensor on their way to this rank, a few at a time, in the order in which it uses them.

    order   (owner, block) of all blocks
    source  owner -> the rank that sends its blocks to this one
    sent    (block, peer): what this rank sends on, in order, each as soon as it is here
    in_use  how many blocks the caller uses at a time: one that it was given is left alone until so many more are asked
            for

    AHEAD blocks of other owners are under way while one is used, so that they travel under the computation.
    """

    def __init__(
        self, comm: Communicator, model: Model, shard: Array, tag: Tag, order: list[tuple[int, int]],
        source: Callable[[int], int], sent: list[tuple[int, int]], in_use: int = 1
    ) -> None:
        self.comm, self.tag, self.in_use = comm, tag, in_use
        self.phase = comm.phase  # the books' entry for all its messages, whenever they are posted
        self.own = model.grid.blocks
        self.order = order
        self.first_of = {owner: model.grid.blocks_of(owner).start for owner, _ in order}
        self.asked_for = deque((owner, block) for owner, block in order if owner != comm.rank)
        self.source = source
        self.round = -1  # of the latest block that was asked for
        self.sent = deque(sent)
        self.here = dict(zip(model.grid.blocks, shard))
        self.under_way: deque[tuple[int, Request]] = deque()
        self.leaving: dict[int, list[Request]] = {}
        spare = min(in_use + AHEAD + (comm.size > 2), len(self.asked_for))  # one more where blocks are passed on
        self.free = deque(model.empty("buffers", *shard.shape[1:]) for _ in range(spare))

    def post(self, first: int | None = None) -> None:
        """Irecv into every buffer that is free, or only the `first` blocks; Isend what is here and due."""
        with self.comm.counting(self.phase):
            while self.free and self.asked_for and len(self.under_way) != first:
                owner, block = self.asked_for.popleft()
                self.round = block - self.first_of[owner]
                self.under_way.append((block, self.comm.Irecv(self.free.popleft(), self.source(owner), self.tag)))
            while self.under_way and self.comm.is_here(self.under_way[0][1]):
                self._receive()
            while self.sent and self._is_due(self.sent[0][0]):
                block, peer = self.sent.popleft()
                self.leaving.setdefault(block, []).append(self.comm.Isend(self.here[block], peer, self.tag))

    def _is_due(self, block: int) -> bool:
        """Whether to send a block now: if it is here; this rank's own not before it asks for those of the same round.
        What is sent before its receiver asks for it may be on the link before what is needed sooner."""
        asked_for = self.all_posted or block - self.own.start <= self.round
        return block in self.here and (asked_for or block not in self.own)

    @property
    def all_posted(self) -> bool:
        """Whether the last of the tensor's blocks has set off."""
        return not self.asked_for

    def _receive(self) -> None:
        block, request = self.under_way.popleft()
        self.comm.Wait(request)
        self.here[block] = request.array

    def __iter__(self) -> Iterator[tuple[int, int, Array]]:
        """(owner, block, its weights), as soon as each is here."""
        used: deque[int] = deque()
        for owner, block in self.order:
            self.post()
            while block not in self.here:
                self._receive()
                self.post()
            yield owner, block, self.here[block]
            used.append(block)
            if len(used) == self.in_use:
                self._release(used.popleft())
        for requests in self.leaving.values():
            self.comm.Waitall(requests)

    def _release(self, block: int) -> None:
        """Receive into a block's buffer again, once what was sent from it has left."""
        if self.asked_for and block not in self.own:
            self.comm.Waitall(self.leaving.pop(block, []))
            self.free.append(self.here.pop(block))
            self.post()


def ring(comm: Communicator, model: Model, shard: Array, tag: Tag, steps: Iterable[int] | None = None) -> Coming:
    """Blocks go round, each from rank to rank until all have had it. This rank uses its own first, then its left
    neighbour's and so on, or in the order of `steps`; and starts over with the second block of each."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    # In a round a rank sends its own block and passes on what comes, but for its right neighbour's own.
    blocks = owned(comm, model)
    sent = [(block, right) for owner, block in in_turn(blocks, comm.rank, range(comm.size)) if owner != right]
    order = list(in_turn(blocks, comm.rank, range(comm.size) if steps is None else steps))
    return Coming(comm, model, shard, tag, order, lambda owner: left, sent if comm.size > 1 else [])


def owners_in_turn(comm: Communicator, model: Model) -> list[tuple[int, int]]:
    """(owner, block) in attention's order, the same on every rank: each owner's first, then each owner's second, ..."""
    return list(in_turn(owned(comm, model), comm.rank, (comm.rank - owner for owner in range(comm.size))))


def broadcasts(comm: Communicator, model: Model, shard: Array, tag: Tag) -> Coming:
    """Every owner in turn sends a block to all, in one order on every rank. Three are used at a time: while one is
    attended with, the next two are projected with; in the backward, while gradients of one are formed, the next two are
    attended with."""
    order = owners_in_turn(comm, model)
    sent = [(block, peer) for owner, block in order if owner == comm.rank for peer in comm.others]
    return Coming(comm, model, shard, tag, order, lambda owner: owner, sent, in_use=3)


def travel(comm: Communicator, model: Model, shard: Array, tag: Tag) -> Coming:
    """Attention's blocks are broadcast, all others go round the ring. In the backward a rank uses its own blocks last
    in each round, so that the gradients of others' are on their way home meanwhile."""
    if tag == Tag.ATTENTION_WEIGHTS:
        return broadcasts(comm, model, shard, tag)
    return ring(comm, model, shard, tag, own_last(comm.size) if comm.phase[1] == "backward" else None)


def set_off(comm: Communicator, model: Model, shard: Array, tag: Tag, first: int | None = None) -> None:
    """Post the first messages of a tensor's blocks, which are used in the part after the one that comes now."""
    part = tag.name.removesuffix("_WEIGHTS").lower()
    with comm.counting((part, comm.phase[1] or "forward")):
        model.coming[tag] = travel(comm, model, shard, tag)
    model.coming[tag].post(first)


def arriving(comm: Communicator, model: Model, shard: Array, tag: Tag) -> Coming:
    """The blocks of a tensor: those that have set off, or else they do now."""
    return model.coming.pop(tag, None) or travel(comm, model, shard, tag)


def follow(model: Model) -> None:
    """Let the next part's messages set off: called by a part when all that it needs sooner is under way."""
    for set_off_now in model.following:
        set_off_now()
    model.following = []


def gathers(comm: Communicator, model: Model, saved: AttentionSaved) -> Ahead[GatherKeysValues]:
    """The keys and values of all blocks, as the forward has kept them, one after the other; the first have set off."""
    with comm.counting(("attention", "backward")):
        return Ahead(GatherKeysValues(comm, model, saved.keys_values[block], Tag.KEYS_VALUES)
                     for _, block in owners_in_turn(comm, model))


def keys_values_set_off(comm: Communicator, model: Model, saved: AttentionSaved) -> None:
    """Post the first keys and values that a backward needs."""
    model.coming[Tag.KEYS_VALUES] = gathers(comm, model, saved)


@phase("embedding", "forward")
def embedding_forward(comm: Communicator, model: Model, tokens: Tiles, weights: Parameters) -> Tiles:
    """tokens: slot -> [B, s], of this rank's slots. Returns slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    blocks = arriving(comm, model, weights.embedding, Tag.EMBEDDING_WEIGHTS)
    for _, block, table in blocks:
        if blocks.all_posted:
            follow(model)
        for slot in grid.slots:
            comm.progress(block, slot)
            output[slot].add(block, embed_forward(xp, tokens[slot], table, block * len(table)))
    return {slot: model.memory.track("activations", output[slot].total) for slot in grid.slots}


@phase("embedding", "backward")
def embedding_backward(
    comm: Communicator, model: Model, dx: Tiles, tokens: Tiles, weights: Parameters, gradients: Parameters
) -> None:
    """Writes the embedding's gradient; where the head is tied to it, adds to what the head has written.

    The rows themselves are not needed, so nothing circulates: every rank works for each owner in turn, as in the ring.
    """
    config, grid, xp = model.config, model.grid, model.xp
    dealt = owned(comm, model)
    expected = when_own_is_last(dealt, comm.rank)
    home = ReduceToOwner(comm, model, weights.embedding.shape[1:], Tag.EMBEDDING_GRADIENTS, expected)
    for owner, block in in_turn(dealt, comm.rank, own_last(comm.size)):
        dtable = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            comm.progress(block, slot)
            leaf = model.empty("working", *weights.embedding.shape[1:])
            embed_backward(xp, dx[slot], tokens[slot], block * len(leaf), out=leaf)
            dtable.add(slot, leaf)
        home.receive(turn(dealt, comm.rank, owner, block))
        home.send(owner, block, dtable)
    put_off(model, partial(home.write, gradients.embedding, config.tied_head))


@phase("attention", "forward")
def attention_forward(
    comm: Communicator, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, AttentionSaved]:
    """x plus the attention of the normalised x: slot -> [B, s, h].

    Kept keys and values: block -> [tiles, 2, B, K/G, s, e], this rank's tokens only. Those of one block are exchanged
    while the next two are projected and the two before it are attended with.
    """
    config, grid, xp, track = model.config, model.grid, model.xp, model.memory.track
    normed = normalise(model, x, weights.gains[2 * layer])
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    saved = AttentionSaved(x)

    def projected() -> Iterator[tuple[int, Array, GatherKeysValues]]:
        for _, block, packed in arriving(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS):
            wqkv, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            own = model.empty("activations", len(grid.slots), 2, config.batch_size,
                              config.kv_heads_per_block, config.tile_len, config.head_dim)
            saved.keys_values[block] = own
            for tile, slot in enumerate(grid.slots):
                comm.progress(block, slot)
                q, own[tile, 0], own[tile, 1] = qkv_forward(
                    xp, normed[slot], wqkv, model.rotary[slot], config.group_size)
                saved.q[block, slot] = track("activations", q)
                saved.tile_keys_values[block, slot] = own[tile]
            yield block, wo, GatherKeysValues(comm, model, own, Tag.KEYS_VALUES)
        follow(model)

    for block, wo, exchange in Ahead(projected(), 2):
        keys_values = exchange.finish()  # -> [2, B, K/G, S, e]
        for slot in grid.slots:
            comm.progress(block, slot)
            k, v = keys_values[:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
            heads, logsumexp = attend_forward(xp, saved.q[block, slot], k, v, model.mask)
            output[slot].add(block, out_forward(xp, heads, wo, config.tile_len))
            saved.heads[block, slot] = track("activations", heads)
            saved.logsumexp[block, slot] = track("activations", logsumexp)
        del keys_values, k, v  # before the next block's are put together
    return add_residual(model, x, totals(output)), saved


@phase("attention", "backward")
def attention_backward(
    comm: Communicator, model: Model, dy: Tiles, saved: AttentionSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's attention gradients and the tiles' gain gradients.

    Weights, keys and values travel again, those of the next block while this one is attended with. Gradients of keys
    and values go home to the tokens' owners under the next two blocks' attention; only then can those of the block's
    weights be formed, which go home to the block's owner. (Two, because ranks do not keep the same pace: one that is
    behind by less than a block would hold up the others.)
    """
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer]
    normed = normalise(model, saved.x, gain)
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    expected = [((block, 0), peer, block) for block in grid.blocks for peer in comm.others]
    home = ReduceToOwner(comm, model, weights.attention[layer].shape[1:], Tag.ATTENTION_GRADIENTS, expected)
    blocks = arriving(comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS)
    exchanges = model.coming.pop(Tag.KEYS_VALUES, None) or gathers(comm, model, saved)

    def attended() -> Iterator[tuple[int, int, Array, Tiles, dict[int, Tree[Array]], ScatterKeysValues]]:
        for exchange, (owner, block, packed) in zip(exchanges, blocks, strict=True):  # strict, so that both end
            _, wo = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            keys_values = exchange.finish()  # -> [2, B, K/G, S, e]
            dq: Tiles = {}
            dkv = {slot: Tree[Array](grid.readers(slot)) for slot in range(config.tiles)}
            for slot in grid.slots:
                comm.progress(block, slot)
                k, v = keys_values[:, :, :, : grid.visible(slot)]  # -> [B, K/G, n, e], [B, K/G, n, e]
                heads = saved.heads[block, slot]
                dheads = out_backward(xp, dy[slot], heads, wo, config.tile_len)  # -> [B, K/G, g*s, e]
                dq[slot], dkeys = attend_backward(
                    xp, dheads, saved.q[block, slot], k, v, model.mask, heads, saved.logsumexp[block, slot])
                for seen, tree in dkv.items():
                    if slot in tree.leaves:
                        tree.add(slot, dkeys[:, :, :, grid.tokens(seen)])
            del keys_values, k, v, dkeys  # before the next block's are put together
            yield owner, block, packed, dq, dkv, ScatterKeysValues(comm, model, dkv, Tag.KEYS_VALUES_GRADIENTS)
        follow(model)

    for owner, block, packed, dq, dkv, exchange in Ahead(attended(), 2):
        exchange.finish()
        wqkv, _ = attention_views(config, packed)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
        dweights = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            comm.progress(block, slot)
            leaf = model.empty("working", packed.size)
            dwqkv, dwo = attention_views(config, leaf)  # -> [h, (H+2*K)/G*e], [H/G*e, h]
            dk, dv = dkv[slot].total  # -> [B, K/G, s, e], [B, K/G, s, e]
            dnormed[slot].add(block, qkv_backward(
                xp, dq[slot], dk, dv, normed[slot], wqkv, model.rotary[slot], out=dwqkv))
            out_backward_weight(xp, dy[slot], saved.heads[block, slot], out=dwo)
            dweights.add(slot, leaf)
        if owner == comm.rank:
            home.receive((block, 0))
        home.send(owner, block, dweights)
    put_off(model, partial(home.write, gradients.attention[layer]))
    dx = normalise_backward(model, totals(dnormed), saved.x, gain, dgain, 2 * layer)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("mlp", "forward")
def mlp_forward(
    comm: Communicator, model: Model, x: Tiles, weights: Parameters, layer: int
) -> tuple[Tiles, MlpSaved]:
    """x plus the gated feed-forward part of the normalised x: slot -> [B, s, h]."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[2 * layer + 1])
    output = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    saved = MlpSaved(x)
    blocks = arriving(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
    for _, block, packed in blocks:
        if blocks.all_posted:
            follow(model)
        gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
        for slot in grid.slots:
            comm.progress(block, slot)
            y, projected = swiglu_forward(xp, normed[slot], gate_up, down)  # -> [B, s, h], [B*s, 2*f/G]
            output[slot].add(block, y)
            saved.projected[block, slot] = model.memory.track("activations", projected)
    return add_residual(model, x, totals(output)), saved


@phase("mlp", "backward")
def mlp_backward(
    comm: Communicator, model: Model, dy: Tiles, saved: MlpSaved, weights: Parameters, layer: int,
    gradients: Parameters, dgain: Tiles
) -> Tiles:
    """dy: slot -> [B, s, h]. Returns dx; writes the layer's MLP gradients and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    gain = weights.gains[2 * layer + 1]
    normed = normalise(model, saved.x, gain)
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    dealt = owned(comm, model)
    expected = when_own_is_last(dealt, comm.rank)
    home = ReduceToOwner(comm, model, weights.mlp[layer].shape[1:], Tag.MLP_GRADIENTS, expected)
    blocks = arriving(comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS)
    for owner, block, packed in blocks:
        if blocks.all_posted:
            follow(model)
        gate_up, down = mlp_views(config, packed)  # -> [h, 2*f/G], [f/G, h]
        dweights = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            comm.progress(block, slot)
            leaf = model.empty("working", packed.size)
            projected = saved.projected[block, slot]
            dnormed[slot].add(block, swiglu_backward(
                xp, dy[slot], normed[slot], gate_up, down, projected, out=mlp_views(config, leaf)))
            dweights.add(slot, leaf)
        home.receive(turn(dealt, comm.rank, owner, block))
        home.send(owner, block, dweights)
    put_off(model, partial(home.write, gradients.mlp[layer]))
    dx = normalise_backward(model, totals(dnormed), saved.x, gain, dgain, 2 * layer + 1)
    return {slot: dy[slot] + dx[slot] for slot in grid.slots}


@phase("head", "forward")
def head_forward(
    comm: Communicator, model: Model, x: Tiles, targets: Tiles, weights: Parameters
) -> tuple[float, HeadSaved]:
    """The mean cross-entropy over all tokens, in nats, on every rank. The logits exist for one block at a time."""
    config, grid, xp = model.config, model.grid, model.xp
    normed = normalise(model, x, weights.gains[-1])
    triples = {slot: Tree[Array](range(config.blocks), partial(merge_triples, xp)) for slot in grid.slots}
    for _, block, table in arriving(comm, model, weights.head_table, Tag.HEAD_WEIGHTS):
        for slot in grid.slots:
            comm.progress(block, slot)
            triples[slot].add(block, logits_forward(xp, normed[slot], table, targets[slot], block * len(table)))
    saved = HeadSaved(x)
    sums: Tiles = {}
    for slot in grid.slots:
        losses, logsumexp = token_losses(xp, triples[slot].total)  # -> [B*s], [B*s]
        saved.logsumexp[slot] = model.memory.track("activations", logsumexp)
        sums[slot] = xp.sum(losses, keepdims=True)  # [B*s] -> [1]
    return mean_loss(comm, model, sums), saved


@phase("head", "backward")
def head_backward(
    comm: Communicator, model: Model, saved: HeadSaved, targets: Tiles, weights: Parameters, gradients: Parameters,
    dgain: Tiles
) -> Tiles:
    """Returns dx: slot -> [B, s, h]; writes the head's gradient and the tiles' gain gradients."""
    config, grid, xp = model.config, model.grid, model.xp
    scale = 1.0 / (config.batch_size * config.seq_len)
    normed = normalise(model, saved.x, weights.gains[-1])
    dnormed = {slot: Tree[Array](range(config.blocks)) for slot in grid.slots}
    dealt = owned(comm, model)
    expected = when_own_is_last(dealt, comm.rank)
    home = ReduceToOwner(comm, model, weights.head_table.shape[1:], Tag.HEAD_GRADIENTS, expected)
    blocks = arriving(comm, model, weights.head_table, Tag.HEAD_WEIGHTS)
    for owner, block, table in blocks:
        if blocks.all_posted:
            follow(model)
        dtable = Tree[Array](range(config.tiles))
        for slot in grid.slots:
            comm.progress(block, slot)
            leaf = model.empty("working", *table.shape)
            dnormed[slot].add(block, logits_backward(
                xp, scale, normed[slot], table, targets[slot], block * len(table), saved.logsumexp[slot], out=leaf))
            dtable.add(slot, leaf)
        home.receive(turn(dealt, comm.rank, owner, block))
        home.send(owner, block, dtable)
    put_off(model, partial(home.write, gradients.head_table))
    return normalise_backward(model, totals(dnormed), saved.x, weights.gains[-1], dgain, -1)


@phase("loss", "forward")
def mean_loss(comm: Communicator, model: Model, sums: Tiles) -> float:
    """The mean over all tokens, on every rank, of slot -> [1], the sum of a tile's losses."""
    total = all_reduce(comm, model.grid.slots_of, sums, Tag.LOSS)
    return model.number(total) / (model.config.batch_size * model.config.seq_len)


@phase("gains", "backward")
def gains_backward(comm: Communicator, model: Model, dgain: Tiles, gradients: Parameters) -> None:
    """Writes the gradient of all gains, which every rank holds: the sum over tiles of slot -> [2L+1, h]."""
    gradients.gains[...] = all_reduce(comm, model.grid.slots_of, dgain, Tag.GAIN_GRADIENTS)


def model_forward(
    comm: Communicator, model: Model, weights: Parameters, tokens: Tiles, targets: Tiles
) -> tuple[float, Saved]:
    """The loss of a batch, and what the backward needs. tokens and targets: slot -> [B, s], of this rank's slots."""
    saved = Saved(tokens, targets)
    config = model.config
    model.following = [partial(set_off, comm, model, weights.attention[0], Tag.ATTENTION_WEIGHTS)]
    x = embedding_forward(comm, model, tokens, weights)
    for layer in range(config.num_layers):
        model.following = [partial(set_off, comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS, 1)]
        x, attention = attention_forward(comm, model, x, weights, layer)
        if layer + 1 < config.num_layers:
            model.following = [partial(set_off, comm, model, weights.attention[layer + 1], Tag.ATTENTION_WEIGHTS)]
        else:
            model.following = [partial(set_off, comm, model, weights.head_table, Tag.HEAD_WEIGHTS)]
        x, mlp = mlp_forward(comm, model, x, weights, layer)
        saved.attention.append(attention)
        saved.mlp.append(mlp)
        forget(model, saved)
    loss, saved.head = head_forward(comm, model, x, targets, weights)
    finish_all(comm, model)
    return loss, saved


@phase("model", "backward")
def model_backward(comm: Communicator, model: Model, saved: Saved, weights: Parameters, gradients: Parameters) -> None:
    """Writes the gradient of the loss, for this rank's blocks, into `gradients`; uses up what was saved."""
    config = model.config
    dgain = {slot: model.empty("working", *weights.gains.shape) for slot in model.grid.slots}
    if model.recompute != "full":
        model.following = [partial(set_off, comm, model, weights.mlp[-1], Tag.MLP_WEIGHTS, 1)]
    dx = head_backward(comm, model, saved.head, saved.targets, weights, gradients, dgain)
    for layer in reversed(range(config.num_layers)):
        if model.recompute == "full":
            model.following = [partial(set_off, comm, model, weights.mlp[layer], Tag.MLP_WEIGHTS, 1)]
            x, saved.attention[-1] = attention_forward(comm, model, saved.attention[-1].x, weights, layer)
            saved.mlp[-1] = mlp_forward(comm, model, x, weights, layer)[1]
            del x  # which the MLP's backward is the last to need
        if model.recompute == "none":
            model.following = [partial(keys_values_set_off, comm, model, saved.attention[-1]),
                               partial(set_off, comm, model, weights.attention[layer], Tag.ATTENTION_WEIGHTS)]
        dx = mlp_backward(comm, model, dx, saved.mlp.pop(), weights, layer, gradients, dgain)
        if model.recompute == "attention":
            saved.attention[-1] = attention_forward(comm, model, saved.attention[-1].x, weights, layer)[1]
        if layer and model.recompute != "full":
            model.following = [partial(set_off, comm, model, weights.mlp[layer - 1], Tag.MLP_WEIGHTS, 1)]
        dx = attention_backward(comm, model, dx, saved.attention.pop(), weights, layer, gradients, dgain)
    embedding_backward(comm, model, dx, saved.tokens, weights, gradients)
    gains_backward(comm, model, dgain, gradients)
    finish_all(comm, model)


@phase("optimizer", "backward")
def gradient_norm(comm: Communicator, model: Model, gradients: Parameters) -> float:
    """The Euclidean norm of all gradients, the same bits on every rank: squares summed over blocks by the tree."""
    grid, xp = model.grid, model.xp
    partials = {block: squares(model, gradients, position) for position, block in enumerate(grid.blocks)}
    total = all_reduce(comm, grid.blocks_of, partials, Tag.GRADIENT_NORM)
    return model.number(xp.sqrt(xp.sum(total) + xp.sum(gradients.gains * gradients.gains)))
