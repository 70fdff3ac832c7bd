# SPDX-License-Identifier: MIT
"""Each formula and its gradient against a naive loop in float64, written from its equation; what is
refused, and what other projects need; then the toy against plain Python; then the demo from the
command line.  No oracle shares code with what it checks."""
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tabom
import toy_data
from tabom import (LaggedCopy, Trajectories, by_confidence, by_entropy, cut, decode, dinfer_loss,
                   discrimination_score, draw_below, from_steps, nelbo_loss, pairwise_rank_loss,
                   pick_tokens, post_train, predictive_entropy, replay, t3d_loss, tabom_loss)

PROJECT = pathlib.Path(tabom.__file__).parent
# ==== Shared: two stand-in models, random trajectories, and oracles in float64 ====================
L, N, V, MASK = 2, 6, 5, 5      # [MASK] is an input only: there is no logit for it
INF, NAN, FLOAT32 = math.inf, math.nan, torch.finfo(torch.float32)

class Scripted:
    """Answers with `table` (N, V) or (B, N, V) for the response, whatever it sees."""
    def __init__(self, table):
        self.table, self.seen = table, []
    def __call__(self, tokens):
        self.seen.append(tokens.clone())
        before = self.table.new_full((len(tokens), L, self.table.shape[-1]), NAN)   # never read
        return torch.cat([before, self.table.expand(len(tokens), *self.table.shape[-2:])], 1)

class TinyModel(nn.Module):
    """A small random network: every logit depends on every token and on every position."""
    def __init__(self, seed=0):
        super().__init__()
        token, place, out = torch.randn(3, 16, 8, generator=seeded(seed), dtype=torch.float32)
        self.token, self.place = nn.Parameter(token), nn.Parameter(place)
        self.out, self.seen = nn.Parameter(out[:V].T.contiguous()), []
    def forward(self, tokens):
        self.seen.append(tokens.clone())
        x, place = self.token[tokens], self.place[:tokens.shape[1]]
        return torch.tanh(x + 0.5 * (x * place).sum(1, keepdim=True) + place) @ self.out

def seeded(seed=0):
    return torch.Generator("cpu").manual_seed(seed)
def random(*shape):
    return torch.randn(*shape, generator=seeded())
def random_trajectories(n_rows=6, seed=0, n_given=(0, 1, 3)):
    """Random responses in random orders; the rows take turns in how many positions were given."""
    generator = seeded(seed)
    decode_rank = torch.stack([torch.randperm(N, generator=generator) for _ in range(n_rows)])
    given = torch.tensor([n_given[row % len(n_given)] for row in range(n_rows)])[:, None]
    return Trajectories(torch.randint(V, (n_rows, L), generator=generator), torch.randint(
        V, (n_rows, N), generator=generator), (decode_rank - given).clamp(min=-1))

DATA = random_trajectories()
P, R, K = vars(DATA).values()                # prompt, response, decode_rank

def log_p(logits):
    """One position, (V,) -> log probabilities in float64."""
    x = logits.double() - logits.double().max()
    return x - x.exp().sum().log()
def entropy_of(logits):
    return -sum(value.exp() * value for value in log_p(logits) if value > -INF)
def mean(values):
    return sum(values := list(values)) / max(1, len(values))
def look(model, data, row, masked):
    shown = [MASK if i in masked else x for i, x in enumerate(data.response[row].tolist())]
    return model(torch.tensor([data.prompt[row].tolist() + shown]))[0, L:]
def by_rank(data, row):
    return [i for rank, i in sorted(zip(data.decode_rank[row].tolist(), range(N))) if rank >= 0]
def drawn_states(name, data, seed=0, **settings):
    """What a loss hides, and where a gradient arrives: positions in reveal order, by row."""
    model, states = Scripted(random(len(data), N, V).requires_grad_()), []
    call(name, model, data, seed, **settings)[0].backward()
    hides, supervises = model.seen[0][:, L:] == MASK, model.table.grad.abs().sum(-1) > 0
    for row in range(len(data)):
        order, size = by_rank(data, row), settings.get("window_size", 3)
        hidden, learned = ([i for i in order if x[row, i]] for x in (hides, supervises))
        states.append((hidden, learned))
        assert len(hidden) == hides[row].sum() and 0 < len(learned) == supervises[row].sum()
        assert name == "nelbo" or hidden == order[-len(hidden):]         # a state on the way
        assert learned == hidden[:{"dinfer": len(learned), "tabom": size}.get(name)]     # no gap
    return states
def naive(name, model, data, states, margin=0.2, rank_weight=1, reference=0, a=.5, b=.1, c=.2, **_):
    """Eq. 1, dInfer, Eq. 8-9 and T3D, position by position -> [loss, *metrics]."""
    rows, right = [], []
    for row, (hidden, learned) in enumerate(states):
        logits, written = look(model, data, row, hidden), data.response[row]
        ours = [log_p(x) for x in logits]
        nll = [-ours[i][written[i]] for i in learned]
        rows.append([mean(nll), mean(nll)])
        if name == "tabom":
            pairs = list(itertools.combinations([entropy_of(logits[i]) for i in learned], 2))
            rank_loss = mean(max(0.0, earlier - later + margin) for earlier, later in pairs)
            rows[-1] = [mean(nll) + rank_weight * rank_loss, mean(nll), rank_loss]
            right += [float(earlier < later) for earlier, later in pairs]
        if name == "t3d":
            theirs = [log_p(x.detach()) for x in look(reference, data, row, hidden)]
            better = mean((ours[i] - theirs[i])[written[i]] for i in hidden)
            worse = mean((ours[i] - theirs[i])[theirs[i].argmax()] for i in hidden)
            preference = (1 + (-b * better).exp()).log() + a * (1 + (b * worse).exp()).log()
            path = mean((len(hidden) - k) / len(hidden) * x for k, x in enumerate(nll))
            rows[-1] = [preference + c * path, preference, path]
    return [*map(mean, zip(*rows)), *([mean(right)] if name == "tabom" else [])]

LOSSES = {"nelbo": (nelbo_loss, {}), "dinfer": (dinfer_loss, {}),
          "t3d": (t3d_loss, {"reference": TinyModel(seed=9)}),
          "tabom": (tabom_loss, {"window_size": 3, "margin": 0.2, "rank_weight": 1.0})}
every_loss = pytest.mark.parametrize("name", LOSSES)
def call(name, model, data, seed=0, **settings):
    loss_fn, usual = LOSSES[name]
    return loss_fn(model, data, **{"mask_id": MASK, "generator": seeded(seed), **usual, **settings})
def fit(values, choices, shares=None):
    """Whether values come as often as their shares (default: alike) say: chi square, p = 1e-4."""
    values, choices = list(values), list(choices)
    due = [len(values) * share for share in shares or [1 / len(choices)] * len(choices)]
    chi_square, f = sum((values.count(x) - y) ** 2 / y for x, y in zip(choices, due)), len(due) - 1
    limit = f * (1 + 3.72 * math.sqrt(2 / 9 / f) - 2 / 9 / f) ** 3
    return set(values) <= set(choices) and chi_square < limit
def close(value, expected, tolerance=1e-5):
    value, expected = (float(torch.as_tensor(x).detach()) for x in (value, expected))
    return value == pytest.approx(expected, rel=tolerance, abs=tolerance)
def same(one, other):
    return all(map(torch.equal, vars(one).values(), vars(other).values()))
def refuses(message, function, *arguments, **settings):
    with pytest.raises(ValueError, match=message) as caught:
        function(*arguments, **settings)
    assert str(caught.value)[-1] in ".?)" and "\n" not in str(caught.value)

# ==== Entropy, the ranking loss, trajectories, cuts and draws =====================================
@pytest.mark.parametrize("h, margin, expected, gradient", [
    ([0.5, 0.3, 0.9], 0.2, 0.4 / 3, [1 / 3, -1 / 3, 0]),
    ([0.5, 0.3, 0.9], 1.0, 2.2 / 3, [2 / 3, 0, -2 / 3]),
    ([0.5, 0.5, 0.9], 0.2, 0.2 / 3, [1 / 3, -1 / 3, 0])])
def test_rank_loss_worked_example(h, margin, expected, gradient):
    """Entropies 0.5, 0.3, 0.9 in reveal order; pairs (1,2): 0.5 - 0.3 + 0.2 = 0.4, else 0: mean
    0.4 / 3.  A descent step lowers the entropy of the first and raises that of the second; or of
    the third, at margin 1.  Beside it a position outside, not read, and a row without a pair."""
    entropy = torch.tensor([[h[1], h[2], NAN, h[0]], [1, NAN, NAN, NAN]], requires_grad=True)
    rank, window = torch.tensor([[1, 3, 2, 0], [0, 1, 2, 3]]), ~entropy.detach().isnan()
    for rows in (1, 2):
        loss, accuracy = pairwise_rank_loss(entropy[:rows], rank[:rows], window[:rows], margin)
        grad, = torch.autograd.grad(loss, entropy)
        assert close(loss, expected / rows) and close(accuracy, 2 / 3)
        torch.testing.assert_close(grad[0, [3, 0, 1, 2]], torch.tensor([*gradient, 0]) / rows)
        assert (grad[1] == 0).all() and not accuracy.requires_grad
    for logits in (torch.tensor([0.9, 0.1]).log(), torch.tensor([[[0.0, 0.9, 0.1]]]).log()):
        assert close(predictive_entropy(logits), 0.3250830)              # by hand, of any shape

def test_trajectories_are_indexed_joined_thinned_and_made_from_steps():
    """Where positions are left out the others close ranks; ties by entropy, if given."""
    for index, rows in ((torch.arange(6) % 3 == 0, [0, 3]), (slice(1, 5, 2), [1, 3]), (P[0], P[0])):
        assert same(DATA[index], Trajectories(P[rows], R[rows], K[rows]))
    assert same(Trajectories.cat([DATA[:2], DATA[2:2], DATA[2:]]), DATA) and len(DATA[:2]) == 2
    part = DATA.only(keep := torch.rand(6, N, generator=seeded()) < 0.7)
    for row in range(6):
        assert by_rank(part, row) == [i for i in by_rank(DATA, row) if keep[row, i]]
    assert part.response is R and DATA.n_decoded.tolist() == [6, 5, 3, 6, 5, 3]
    steps = torch.tensor([[2, 0, 0, 100], [127, -1, 127, 0], [2, 0, -1, 0]])
    entropy = torch.tensor([[0.5, 9, 2, 0], [5, 0, 4, 9], [.3, .9, .1, .4]])
    for step, h, ranks in ((steps, None, [[2, 0, 1, 3], [1, -1, 2, 0], [2, 0, -1, 1]]),
                           (steps.char(), entropy, [[2, 1, 0, 3], [2, -1, 1, 0], [2, 1, -1, 0]])):
        assert from_steps(P[:3], R[:3, :4], step, h).decode_rank.tolist() == ranks

def test_draws_are_uniform_for_each_row_and_spread_over_the_rows(monkeypatch):
    generator = seeded()
    for limits in ([5] * 7, [7] * 7, [5], [6, 3, 4]):
        calls = [draw_below(torch.tensor(limits), generator).tolist() for _ in range(1500)]
        assert all(fit(draws, range(limit)) for draws, limit in zip(zip(*calls), limits))
        assert limits != [7] * 7 or all(sorted(draws) == list(range(7)) for draws in calls)
    draws = draw_below(torch.full((8,), 800), generator)
    assert sorted((draws // 100).tolist()) == list(range(8)) and draws.dtype == torch.int64
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1 - 2 ** -24))
    assert (draw_below(x := torch.tensor([1, 7, 7, 7]), generator) < x).all()    # rounded up

SIZES, AMOUNTS = [0, -1, 1.5, 2 ** 31, 2 ** 63, torch.tensor(3), None], [-0.1, INF, NAN]
OF_SIZE, OF_MASK_ID = " must be a whole number from 1 to 2", "mask_id must be a whole number from 0"
@pytest.mark.parametrize("message, function, wrong", [
    ("must be int64", Trajectories, [
        (P[:5], R, K), (P, R[:, 1:], K), (P, R[:5], K), (P, R.float(), K), (P[:, 0], R, K),
        (P.float(), R, K), (P, R, K.int()), (P, R[:, 0], K[:, 0])]),
    ("must hold 0 .. n-1 once each in every row", Trajectories, [
        (P, R, x) for x in (K - 1, K + 1, K.clamp(min=0), K.clamp(max=4), K.where(K != 2, 3),
                            K.where(K != 0, -2), K.where(K != 5, 6), K.where(K != 0, -1))]),
    ("step must hold whole numbers of the shape", from_steps, [(P, R, P), (P, R, K.float())]),
    ("n_visible must be a whole number", cut, [
        (K, -1), (K, 1.0), (K, K[0].float()), (K, K[:5, 0]), (K, P[:, :1]), (K, K[:, 0] - 7)]),
    ("window_size" + OF_SIZE, cut, [(K, 0, size) for size in SIZES]),
    ("must be \\(B, N\\), B > 0", pairwise_rank_loss, [
        (K[0], K, K > 2, 0), (K, K[:5], K > 2, 0), (K, K, P > 2, 0), (K, K, K, 0),
        (P[:0], P[:0], P[:0] > 2, 0)]),
    ("margin must be 0 or more", pairwise_rank_loss, [(K, K, K > 2, x) for x in AMOUNTS]),
    ("use data\\[data.n_decoded > 0\\]", draw_below, [(torch.tensor([3, 0]), None)])])
def test_wrong_arguments_are_refused(message, function, wrong):
    for arguments in wrong:
        refuses(message, function, *arguments)

# ==== The losses, values and gradients ============================================================
@pytest.mark.parametrize("name, settings", [
    ("nelbo", {}), ("dinfer", {}), ("t3d", {}), ("t3d", {"a": 2.0, "b": 1.5, "c": 0.7}),
    ("t3d", {"a": 0.0, "c": 0.0}), *(("tabom", dict(window_size=size, margin=margin, rank_weight=x))
      for size in (1, 2, 4, 2 ** 31 - 1) for margin, x in ((0, 1), (0.2, 0.5), (3, 2), (1, 0)))])
def test_every_loss_is_its_equation(name, settings):
    """Loss, metrics and every gradient, in one pass; and along it the loops rise as it says."""
    for seed, cuts in enumerate((None, [0] * 6, [0, 1, 2, 3, 4, 1], [5, 4, 2, 5, 4, 2])):
        data, model, loops = random_trajectories(6, seed), TinyModel(), TinyModel().double()
        given = {"n_visible": torch.tensor(cuts)} if name == "tabom" and cuts else {}
        own = {**settings, **given, **({"reference": TinyModel(9)} if name == "t3d" else {})}
        states = drawn_states(name, data, seed, **own)
        assert not given or cuts == [
            n - len(hidden) for n, (hidden, _) in zip(data.n_decoded, states)]
        loss, metrics = call(name, model, data, seed, **own)
        loss.backward()
        expected = naive(name, loops, data, states, **own)
        expected[0].backward()
        assert all(map(close, (loss, *metrics.values()), expected))
        assert (len(model.seen), len(metrics), loss.dtype) == (1, len(expected) - 1, torch.float32)
        assert not any(metric.requires_grad for metric in metrics.values())
        assert name != "t3d" or own["reference"].out.grad is None
        for one, other in zip(model.parameters(), loops.parameters()):
            torch.testing.assert_close(one.grad, other.grad.float())
        rise = []
        for sign in (1, -2):
            loops.out.data += sign * 1e-5 * loops.out.grad / loops.out.grad.norm()
            rise.append(naive(name, loops, data, states, **own)[0].item())
        assert close((rise[0] - rise[1]) / 2e-5, loops.out.grad.norm(), 1e-3)
        assert cuts or loss != call(name, model, data, 99, **own)[0]     # seeded

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("name, settings", [
    ("nelbo", {}), ("dinfer", {}), ("t3d", {}), ("tabom", {"rank_weight": 0}),
    ("tabom", {"rank_weight": 2, "window_size": N}), ("tabom", {"rank_weight": 10, "margin": 3})])
def test_no_ban_and_no_scale_makes_a_gradient_nan(name, settings, dtype, tolerance):
    """[MASK] in the vocabulary, ids banned, p underflows, the loss times 65,536: the gradient is
    that of float64 without these ids.  What does not count now may be nan or +-inf."""
    data = random_trajectories(1, n_given=(0,)).only(torch.arange(N)[None] < 5)
    table, theirs = (4 * random(1, N, V)).to(dtype), random(1, N, V)
    table[0, 3] *= 50
    for seed in range(5):
        own = {"tabom": {"n_visible": torch.tensor([seed]), **settings},
               "t3d": {"reference": Scripted(theirs)}}.get(name, {})
        leaf, states = table.double().requires_grad_(), drawn_states(name, data, seed, **own)
        (due := naive(name, Scripted(leaf), data, states, **own))[0].backward()
        counts = torch.tensor([i in states[0][1] for i in range(N)])[:, None]
        for ban, rubbish in itertools.product((-INF, torch.finfo(dtype).min, -1e38, -1e9),
                                              (0, 300, NAN, INF, -INF)):
            def widen(logits):                   # [MASK] and two that are banned
                banned = torch.tensor([rubbish, ban, ban], dtype=logits.dtype).expand(1, N, 3)
                return torch.cat([logits, banned], -1).masked_fill(~counts, rubbish)
            if name == "t3d":
                own["reference"] = Scripted(widen(theirs))
            full = widen(table).requires_grad_()
            loss, metrics = call(name, Scripted(full), data, seed, **own)
            (loss * 65536).backward()
            assert not full.grad[..., V:].any() and not full.grad[~counts.expand(1, N, 8)].any()
            assert all(close(x, y, 1e-4) for x, y in zip((loss, *metrics.values()), due))
            torch.testing.assert_close(full.grad[..., :V].double() / 65536, leaf.grad,
                                       rtol=tolerance, atol=tolerance / 10)
        bad, last = table.clone(), states[0][1][-1]
        for bad[0, last, data.response[0, last]] in (NAN, INF, -INF):    # where it does count
            refuses("count are nan or \\+inf, or ban", call, name, Scripted(bad), data, seed, **own)

EMPTY = DATA.only((torch.arange(6) != 4)[:, None].expand(6, N))      # row 4: nothing was decoded
@pytest.mark.parametrize("name, setting, values, message", [
    *((name, *case) for name in LOSSES for case in (
        ("mask_id", [4.5, -1, 2 ** 31, torch.tensor(5), None], OF_MASK_ID),
        ("data", [Trajectories(P.clamp(min=2) + 1, R, K)], "the prompt contains mask_id \\(5\\)"),
        ("data", [DATA[:0]], "there are no rows to show"), ("data", [EMPTY], "data.n_decoded > 0"),
        ("model", [lambda _, x=x: x for x in (K[:, :1], random(6, 6, 5), random(6, 8, 1, 1), 0)],
         "must return a tensor of logits \\(6, 8, 'V'\\)"))),
    ("tabom", "window_size", SIZES, "window_size" + OF_SIZE),
    ("tabom", "n_visible", [K[:5, 0], torch.zeros(6), -1, 1.0], "whole number, or one for each"),
    ("tabom", "n_visible", [torch.tensor([0, 0, 3, 0, 0, 0]), 3, 99], "must be below n"),
    *(("tabom", x, AMOUNTS, x + " must be 0 or more and") for x in ("margin", "rank_weight"))])
def test_losses_refuse_what_is_wrong_before_a_forward_pass(name, setting, values, message):
    assert call(name, TinyModel(), EMPTY[EMPTY.n_decoded > 0])
    for value in values:
        refuses(message, call, name, **{"model": (m := TinyModel()), "data": DATA, setting: value})
        assert m.seen == []

@every_loss
@pytest.mark.parametrize("n_rows, calls", [(3000, 1), (2, 600), (1, 600)])
def test_every_state_is_drawn_equally_often(name, n_rows, calls):
    """In one large batch, or in the last row of small ones: numbers hidden, pairs of times, sets"""
    data, drawn = random_trajectories(n_rows, n_given=(2,)), []
    for seed in range(calls):
        drawn += drawn_states(name, data, seed)[0 if calls == 1 else -1:]
    sizes = [(n, size) for n in range(1, 5) for size in range(1, n + 1) if name == "dinfer"
             or size == min(n, 3 if name == "tabom" else n)]
    assert fit([(len(hidden), len(learned)) for hidden, learned in drawn], sizes)
    if name == "nelbo" and calls == 1:           # by rank: the recorded order is not used
        ranks = [tuple(rank[hidden].tolist()) for rank, (hidden, _) in zip(data.decode_rank, drawn)]
        assert fit((x for x in ranks if len(x) == 2), itertools.combinations(range(4), 2))

def test_t3d_at_its_reference_is_known_and_its_reference_lags():
    """(1 + a) log 2 + c times the path term.  Call 0, n, 2n, .. bring the copy up to date."""
    loss, metrics = call("t3d", model := TinyModel(), DATA, reference=model, a=0.7, c=3.0)
    assert close(loss, (1 + 0.7) * math.log(2) + 3 * metrics["path"])
    model, outputs = nn.Linear(1, 1, bias=False), []
    lagged = LaggedCopy(model, every=4)
    for step in range(8):
        model.weight.data.fill_(float(step))
        outputs.append(lagged(torch.ones(1, 1)))
    assert outputs == [0, 0, 0, 0, 4, 4, 4, 4] and model.weight.item() == 7
    assert model.training and not lagged.frozen.training and LaggedCopy(model).every == 10

# ==== The decoder (Eq. 2, Def. 1) =================================================================
def by_score(logits, tokens, candidates):
    """A user's order, in whole numbers, two of them equal; it gets what the model just said."""
    assert torch.equal(logits, TinyModel()(tokens)[:, L:][candidates])
    assert not torch.is_grad_enabled() and (tokens[:, L:][candidates] == MASK).all()
    return torch.tensor([3, 1, 4, 1, 5, 9])[candidates.nonzero()[:, 1]]
def naive_decode(model, prompt, given, order, tokens_per_step, block_length):
    """Eq. 2 for one row of plain lists, greedy -> response, ranks."""
    response, ranks, n_visible = list(given), [-1] * N, 0
    while MASK in response:
        logits = model(torch.tensor([prompt + response]))[0, L:].detach()
        block = response.index(MASK) // block_length
        hidden = [i for i in range(N) if response[i] == MASK and i // block_length == block]
        h = [float(entropy_of(x)) for x in logits]
        score = {by_entropy: h, by_confidence: [-float(log_p(x).max()) for x in logits],
                 by_score: [3, 1, 4, 1, 5, 9]}[order]
        step = sorted(hidden, key=lambda i: (score[i], i))[:tokens_per_step]
        for i in sorted(step, key=lambda i: (h[i], i)):
            response[i] = max(range(V), key=lambda token: logits[i][token])
            ranks[i], n_visible = n_visible, n_visible + 1
    return response, ranks

@pytest.mark.parametrize("order", (by_entropy, by_confidence, by_score))
@pytest.mark.parametrize("tokens_per_step", (1, np.int64(2), 4, 2 ** 31 - 1))
def test_decode_equals_a_naive_decoder_row_by_row(order, tokens_per_step):
    """A batch of unequally filled rows is its rows, one by one; none waits for another one."""
    given = R[:4].clone()
    given[0, :3] = given[1, 3:] = given[3, [0, 2, 3, 5]] = MASK
    for block_length, some in itertools.product((None, 1, 2, 4, 2 ** 31 - 1), (given, None)):
        model, passes = TinyModel(), []
        got = decode(model, P[:4], N, mask_id=MASK, tokens_per_step=tokens_per_step,
                     given=some, order=order, block_length=block_length)
        for row, start in enumerate(([[MASK] * N] * 4 if some is None else given.tolist())):
            alone = TinyModel()
            assert (got.response[row].tolist(), got.decode_rank[row].tolist()) == naive_decode(
                alone, P[row].tolist(), start, order, tokens_per_step, block_length or N)
            passes.append(len(alone.seen))
        assert len(model.seen) == max(passes)

@pytest.mark.parametrize("temperature, dtype", [(0.5, torch.float32), (2.0, torch.bfloat16)])
def test_sampled_tokens_follow_the_softmax_and_the_generator(temperature, dtype):
    """softmax(logits / temperature), in float32; the order, and what is cold, are greedy."""
    table = torch.tensor([[0.0, 1.0, -1.0, 0.5], [2.0, 0.0, 1.0, 1.5]], dtype=dtype)
    def run(temperature, generator):
        return decode(Scripted(table), P.repeat(1000, 1), 2, mask_id=5, temperature=temperature,
                      generator=generator)
    before, many, unused = torch.get_rng_state(), random(500, V).to(dtype), seeded()
    greedy, (got, again, other) = run(0, unused), (run(temperature, seeded(x)) for x in (1, 1, 2))
    assert same(got, again) and not same(got, other)
    for logits, tokens in zip(table, got.response.T):
        assert fit(tokens.tolist(), range(4), log_p(logits.float() / temperature).exp().tolist())
    assert all(same(greedy, run(degree, seeded())) for degree in (0.0, 1e-6, FLOAT32.tiny))
    assert got.decode_rank.equal(greedy.decode_rank)
    assert unused.get_state().equal(seeded().get_state()) and torch.get_rng_state().equal(before)
    assert torch.equal(pick_tokens(many, 0.7, seeded()), pick_tokens(many.float(), 0.7, seeded()))

@pytest.mark.parametrize("by, mask_id", [*itertools.product((by_entropy, by_confidence), (0, 2))])
def test_mask_is_never_written(by, mask_id):
    """An entry for [MASK] is neither picked nor counted, even when favoured, however hot."""
    table, others = random(N, 5), [token for token in range(5) if token != mask_id]
    table[:, mask_id], some = 20.0, torch.full((600, L), 3)
    greedy, cold, *hot = (decode(Scripted(table), some, N, temperature=degree, order=by,
                                 mask_id=mask_id, generator=seeded())
                          for degree in (0, FLOAT32.tiny, 1e38, FLOAT32.max))
    without = decode(Scripted(table[:, others]), some, N, mask_id=4, order=by)
    assert torch.equal(greedy.decode_rank, without.decode_rank) and same(greedy, cold)
    assert torch.equal(greedy.response, torch.tensor(others)[without.response])
    assert all(fit(tokens.tolist(), others) for x in hot for tokens in x.response.T)

def test_only_what_is_masked_is_written_and_nothing_is_shared():
    model, prompt, given = TinyModel(), P[:3].clone(), torch.full((3, N), MASK)
    given[:, 5], given[2] = 1, 0
    for start in (given, torch.ones_like(given)):                        # then nothing to do
        before, write = start.clone(), start == MASK
        got = decode(model, prompt, N, mask_id=MASK, given=start)
        assert prompt.equal(P[:3]) and got.prompt.equal(prompt) and start.equal(before)
        assert got.response.where(~write, MASK).equal(start) and len(model.seen) == 5
        assert (got.decode_rank >= 0).equal(write) and not (got.response == MASK).any()
        pointers = [x.data_ptr() for x in (prompt, start, *vars(got).values())]
        assert len(set(pointers)) == 5
    assert len(decode(model, P[:0], N, mask_id=MASK)) == 0

@pytest.mark.parametrize("name, values, message", [
    *((name, SIZES[:7 - (name == "block_length")], name + OF_SIZE)
      for name in ("tokens_per_step", "block_length", "response_length")),
    ("mask_id", [4.5, -1, None, 2 ** 31], OF_MASK_ID), ("prompt", [P[:1] * 0 + MASK], "the prompt"),
    ("temperature", [-1, -1e-9, INF, NAN, 1e-46, 1e39], "temperature must be 0, or from 1.2e-38"),
    ("prompt", [torch.zeros(1, L), P[:1].int(), P[0]], "be int64"),
    ("given", [R[:2], R[:1, 1:], R[0], R[:1] + 0.5, R[:1].int()], "\\(or given\\).* be int64")])
def test_decode_refuses_what_is_wrong_before_a_forward_pass(name, values, message):
    model, right = TinyModel(), {"prompt": P[:1], "response_length": N, "mask_id": MASK}
    for value in values:
        refuses(message, decode, model, **{**right, name: value})
    assert model.seen == []

@pytest.mark.parametrize("order", [by_entropy, by_confidence, lambda *x: x[2].nonzero()[:, 1]])
def test_nan_stops_the_decoder_only_where_it_may_write(order):
    def poisoned(tokens):
        logits, hidden = TinyModel()(tokens), tokens[:, L:] == MASK
        writable = hidden & (torch.arange(N) // 2 == hidden.int().argmax(1)[:, None] // 2)
        return logits.masked_fill(~nn.functional.pad(writable, (L, 0))[..., None], NAN)
    def run(model, order=order, block_length=2):
        return decode(model, P, N, mask_id=MASK, order=order, block_length=block_length)
    assert same(run(poisoned), run(TinyModel()))
    for place, wrong in itertools.product((0, 3), (NAN, INF)):
        table = torch.zeros(6, N, V)
        table[1, place, 1] = wrong
        refuses("logits and order must be finite", run, Scripted(table))
    for bad in (*(lambda x, y=y: x[:, 0].index_fill(0, P[0, :1], y) for y in (NAN, INF, -INF)),
                lambda x: x[None, :, 0], lambda x: x[:, :1], lambda x: x[1:, 0], lambda x: x[0, 0]):
        refuses("one number per candidate", run, TinyModel(), lambda logits, *_: bad(logits), None)

def test_the_score_is_eq_10_and_11_of_replayed_states():
    data, variances = random_trajectories(9, n_given=(0, 1, 3, 5)), []
    states = list(replay(TinyModel(), data, mask_id=MASK))
    assert len(states) == N and not any(entropy.requires_grad for _, entropy in states)
    for (k, (masked, entropy)), row in itertools.product(enumerate(states), range(9)):
        logits = look(TinyModel(), data, row, hidden := by_rank(data, row)[k:])
        assert masked[row].tolist() == [i in hidden for i in range(N)]
        h = [entropy_of(logits[i]) * (i in hidden) for i in range(N)]
        assert all(map(close, entropy[row], h))
        middle = mean(h[i] for i in hidden)
        variances += [mean((h[i] - middle) ** 2 for i in hidden)] * (len(hidden) >= 2)
    assert close(discrimination_score(states), mean(variances))

def test_post_train_collects_checks_keeps_and_trains(monkeypatch):
    """Every update is the gradient of its own batch of accepted rows, each once an epoch."""
    model, updates, tried = TinyModel(), [], []
    queries = torch.cartesian_prod(torch.arange(V), torch.arange(V))     # 25, all different
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.03), seeded()
    own = {"window_size": N, "margin": 0.5, "rank_weight": 9.0}
    def spy(model, rows, **settings):
        loss, metrics = tabom_loss(model, rows, **settings)
        updates.append((rows, torch.autograd.grad(loss, list(model.parameters()), None, True)))
        assert settings == {**own, "mask_id": MASK, "generator": generator}
        return loss, metrics
    def run(verdict):
        return post_train(model, queries, lambda rollouts: tried.append(rollouts) or verdict,
                          optimizer, response_length=N, mask_id=MASK, temperature=1.0, epochs=8,
                          batch_size=4, generator=generator, **own)
    monkeypatch.setattr(tabom, "tabom_loss", spy)
    optimizer.register_step_pre_hook(lambda *_: torch.testing.assert_close(
        [x.grad for x in model.parameters()], [*updates[-1][1]]))
    before, right = torch.get_rng_state(), torch.arange(25) % 5 > 1      # 15
    history, kept = run(right), tried[0][right]
    assert not same(tried[0], decode(TinyModel(), queries, N, mask_id=MASK))         # sampled
    assert tried[0].prompt.equal(queries) and len(history) == len(updates) == 8 * 4
    epochs = [Trajectories.cat(rows for rows, _ in updates[i:][:4]) for i in range(0, 32, 4)]
    assert all(same(one[(one.prompt @ torch.tensor([V, 1])).argsort()], kept) for one in epochs)
    assert len({tuple(one.prompt.flatten().tolist()) for one in epochs}) == 8        # shuffled
    first, last = (mean(x["pair_accuracy"] for x in history[i:][:4]) for i in (0, -4))
    assert last > first + 0.05 and torch.equal(torch.get_rng_state(), before)
    for wrong in (torch.zeros(25).bool(), torch.ones(25)):
        refuses("is_right must be bool, and accept some", run, wrong)
    own["margin"] = tried.clear() or NAN         # found before anything is decoded
    refuses("margin must be 0 or more", run, right)
    assert tried == []

# ==== In other people's projects: foreign models, padding, half precision, memory =================
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_released_loss_is_the_same_where_it_ranks_and_cuts_at_steps_are_states(k):
    """The authors' loss as a slow loop, windows of m steps of k tokens: p log(p + 1e-10), nll over
    all tokens, as ours; pairs of different steps, to which ours adds those within a step."""
    table, data, m = 3 * random(6, N, V), random_trajectories(n_given=(0,)), 2
    step, p = data.decode_rank // k, table.double().softmax(-1)
    h, n = -(p * (p + 1e-10).log()).sum(-1), k * m
    for at in range(N // k - m + 1):
        nll, theirs, within = [], [], []
        for row in range(6):
            inside = [i for i in by_rank(data, row) if at <= step[row, i] < at + m]
            nll += [-p[row, i, data.response[row, i]].log() for i in inside]
            hinges = [(step[row, r] < step[row, s], max(0.0, h[row, r] - h[row, s] + 0.2))
                      for r, s in itertools.combinations(inside, 2)]
            theirs.append(mean(hinge for across, hinge in hinges if across))
            within.append(sum(hinge for across, hinge in hinges if not across))
        _, metrics = call("tabom", Scripted(table), data, window_size=n, n_visible=k * at)
        assert close(metrics["nll"], mean(nll))
        assert close(metrics["rank_loss"] * n * (n - 1) / 2, mean(theirs) * k * (n - k) * m / 2
                     + mean(within), 1e-4)
    data, cutting = decode(model := TinyModel(), P, N, mask_id=MASK, tokens_per_step=k), TinyModel()
    for n_visible in range(N):                   # the states that decoding has visited
        call("tabom", cutting, data, n_visible=n_visible)
        assert any(x.equal(cutting.seen[-1]) for x in model.seen) == (n_visible % k == 0)

def test_the_core_is_one_block_that_works_alone():
    """Cut out between its marks and pasted into an empty file; short; torch and dataclasses."""
    with open(tabom.__file__, encoding="utf-8") as file:
        _, block, *_ = file.read().split("# ==== The method ")               # begins .. ends
    imported = re.findall("^ *(?:from|import) (\\w+)", block, re.MULTILINE)
    assert block.count("\n") - 1 <= 310 and set(imported) == {"dataclasses", "torch"}
    exec("#" + block, core := {"__name__": "core"})
    decoded = core["decode"](TinyModel(), P, N, mask_id=MASK, tokens_per_step=2, block_length=4)
    settings = {"mask_id": MASK, "window_size": N, "margin": 0.2, "rank_weight": 1, "n_visible": 1}
    assert core["tabom_loss"](TinyModel(), decoded, **settings)[0] == tabom_loss(
        TinyModel(), decoded, **settings)[0]

def examples():
    return re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text("utf-8"), re.DOTALL)

@pytest.mark.parametrize("fault", [None, "ignored", "turns causal", "added", "always causal"])
def test_the_padding_check_of_the_readme_finds_a_spoiled_mask(fault):
    """In some public models a mask is ignored, turns attention causal, is added to the scores."""
    x, y, q, k = random(4, 16, 16)
    def model(tokens):                           # padding is 1, and the end token, too
        real, at = (tokens != 1).cumsum(1) > 0, torch.arange(tokens.shape[1])
        h, seen = x[tokens] + y[-len(at):], real[:, None].expand(-1, len(at), -1)
        if fault == "always causal" or fault == "turns causal" and not real.all():
            seen = seen & (at[:, None] >= at)
        scores = h @ q @ k.T @ h.mT / 32
        scores = scores + seen if fault == "added" else scores.masked_fill(
            ~seen & (fault != "ignored"), -1e9)
        return (scores.softmax(-1) @ h)[..., :V]
    prompts = [torch.tensor(x) for x in ([2], [3, 0], [4, 4, 0, 3])]
    rows = nn.utils.rnn.pad_sequence(prompts, True, 1, padding_side="left")
    check, = (text for text in examples() if "padding is seen" in text)
    names = {**globals(), "model": model, "prompts": prompts, "rows": rows}
    if fault:
        error = pytest.raises(AssertionError, exec, check, names)
        return error.match("later tokens" if "always" in fault else "padding is seen") and None
    exec(check, names)                           # and the losses are the same
    apart = mean(call("tabom", model, x, n_visible=i)[0] for i, x in enumerate(names["alone"]))
    loss, _ = call("tabom", model, names["padded"], n_visible=torch.arange(3))
    assert close(loss, apart) and 1 in names["padded"].response

def test_ranks_mean_certainty_if_tokens_are_truncated_where_they_are_picked(monkeypatch):
    """The surest position is the last.  Truncation in the model leaves entropies of 0: leftmost."""
    names, table = {"torch": torch}, torch.tensor([[5.0], [6], [7], [8]]) * torch.eye(4, 5)[0]
    exec(next(text for text in examples() if "top_p" in text), names)
    monkeypatch.setattr(tabom, "pick_tokens", names["pick_tokens"])
    for logits, ranks in ((table.where(table > 0, -INF), [0, 1, 2, 3]), (table, [3, 2, 1, 0])):
        got = decode(Scripted(logits), P, 4, mask_id=5, temperature=0.1)
        assert got.decode_rank.tolist() == [ranks] * 6 and not got.response.any()
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log().expand(1000, 4)
    assert fit(tabom.pick_tokens(logits, 1.0, seeded(), 0.9).tolist(), [1, 2, 3],
               [x / 0.95 for x in (0.5, 0.15, 0.3)])

@pytest.mark.parametrize("context", [torch.float64, torch.bfloat16, "meta"])
@pytest.mark.parametrize("name", [*LOSSES, "decode"])
def test_default_dtypes_and_devices_change_nothing(name, context):
    def run(model):
        if name == "decode":
            got = decode(model, P, N, mask_id=MASK, temperature=1.0, tokens_per_step=2,
                         generator=seeded(), order=by_confidence)
            return *vars(got).values(), discrimination_score(replay(model, got, mask_id=MASK))
        loss, metrics = call(name, model, DATA)
        return loss, *metrics.values(), *torch.autograd.grad(loss, list(model.parameters()))
    expected, model = run(TinyModel()), TinyModel()
    try:
        (torch.set_default_device if context == "meta" else torch.set_default_dtype)(context)
        torch.testing.assert_close([*run(model)], [*expected], rtol=0, atol=0)       # dtypes, too
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)

class Sizes(TorchDispatchMode):                  # of every tensor that torch computes, but views
    made = ()
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.made += (result.numel(), result.nbytes),
        return result
def test_memory_is_that_of_the_window():
    """Nothing is as large as response times vocabulary, or (B, N, N), but the gradient."""
    b, n, v, w = 8, 1024, 60, 32
    rank = torch.stack([torch.randperm(n, generator=seeded(row)) for row in range(b)])
    entropy, logits = random(b, n).requires_grad_(), random(b, n + 1, v).requires_grad_()
    with Sizes() as ranking:
        pairwise_rank_loss(entropy, rank, rank < w, 0.2)[0].backward()
    with Sizes() as forward:
        call("tabom", lambda _: logits, Trajectories(rank[:, :1], rank % v, rank), mask_id=v,
             window_size=w, n_visible=0)
    assert sum(size for _, size in ranking.made) < 5e6 and max(forward.made)[0] == b * w * v

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast_checkpointing_and_compiling(dtype):
    """Half-precision logits: what the same numbers give in float32.  The gradient is unharmed."""
    table = (8 * random(6, N, V)).to(dtype).requires_grad_()
    half, full, plain, compiled = Scripted(table), Scripted(table.float()), TinyModel(), []
    assert all(call(name, half, DATA)[0] == call(name, full, DATA)[0] for name in LOSSES)
    for order in (by_entropy, by_confidence):
        assert same(*(decode(model, P, N, mask_id=MASK, order=order) for model in (half, full)))
    assert torch.autograd.grad(call("tabom", half, DATA)[0], table)[0].dtype == dtype
    network = torch.compile(nn.Sequential(nn.Embedding.from_pretrained(random(9, 8), False)),
                            backend=lambda graph, _: compiled.append(graph) or graph.forward)
    for wrapped, module in ((lambda x: checkpoint(plain, x, use_reentrant=False), plain),
                            (network, network._orig_mod)):
        loss, expected = (call("tabom", x, DATA, mask_id=7)[0] for x in (wrapped, module))
        got, due = (torch.autograd.grad(x, list(module.parameters())) for x in (loss, expected))
        assert loss == expected and all(map(torch.equal, got, due))
    expected, _ = call("tabom", plain, DATA)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = call("tabom", plain, DATA)
    assert compiled and loss.dtype == torch.float32 and close(loss, expected, 0.05)

def train_on_a_part(rank, data, cuts, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mine, gradients = slice(0, 5) if rank == 0 else slice(5, 8), []
    for engine in (nn.parallel.DistributedDataParallel,                  # they average over ranks
                   lambda x: fully_shard(x, mesh=torch.distributed.init_device_mesh("cpu", (2,)))):
        loss, _ = call("tabom", model := engine(TinyModel()), data[mine], n_visible=cuts[mine])
        (loss * 2 * len(data[mine]) / len(data)).backward()
        gradients += [getattr(x.grad, "full_tensor", lambda: x.grad)() for x in model.parameters()]
    torch.save(gradients, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)                                  # gloo's threads can abort an ordinary exit
def test_micro_batches_and_two_processes_get_the_gradient_of_the_whole_batch(tmp_path):
    data, whole, parts, cuts = random_trajectories(8), TinyModel(), TinyModel(), torch.arange(8) % 3
    call("tabom", whole, data, n_visible=cuts)[0].backward()
    rows = torch.utils.data.TensorDataset(*vars(data).values(), cuts)
    for *fields, n_visible in torch.utils.data.DataLoader(rows, batch_size=3):
        loss, _ = call("tabom", parts, micro := Trajectories(*fields), n_visible=n_visible)
        (loss * len(micro) / len(data)).backward()
    torch.multiprocessing.spawn(train_on_a_part, (data, cuts, tmp_path), nprocs=2)
    for got in ([x.grad for x in parts.parameters()] * 2, *(torch.load(tmp_path / f"{rank}.pt")
                                                            for rank in range(2))):
        torch.testing.assert_close(got, [x.grad for x in whole.parameters()] * 2)

# ==== The toy: rows, solutions, the checker, against plain Python =================================
SOLVED = ("41x46a 2214 54 164 205", "41x..a 2214 54 164 205", "41+..a 0095 54 005 009",
          "41x46b 164 205 54 2214", "41x46c 205 2214 54 164")
FIELDS = {"a": "pppp ff uuu ttt", "b": "uuu ttt ff pppp", "c": "ttt pppp ff uuu"}

def rows(*texts):
    """"41x46a 2214 54 164 205" -> tokens (n, 18); "_" is [MASK]."""
    characters = toy_data.VOCABULARY + "_"
    return torch.tensor([[characters.index(c) for c in text if c != " "] for text in texts])

def naive_check(row):
    """Every field right, in either style, and the factor allowed?"""
    text = "".join((toy_data.VOCABULARY + "_")[token] for token in row)
    first, operator, low, high, response = int(text[:2]), text[2], text[3], text[4], text[6:]
    field, at = {}, 0
    for name in FIELDS[text[5]].split():
        field[name[0]], at = response[at:at + len(name)], at + len(name)
    if not field["f"].isdigit():
        return False
    second, (ten, unit) = int(field["f"]), map(int, field["f"])
    answer, units, tens = ((first + second, first % 10 + unit, first // 10 + ten) if operator == "+"
                           else (first * second, first * unit, first * ten))
    allowed = low == "." or all(low <= digit <= high for digit in field["f"])
    return (allowed and field["p"] == f"{answer:04}"
            and sorted([field["u"], field["t"]]) == sorted([f"{units:03}", f"{tens:03}"]))

def test_the_lines_of_the_docstring_are_solutions():
    tokens = rows(*SOLVED)
    again = toy_data.solve(tokens[:, :6], toy_data.read_factor(tokens))
    assert again.equal(tokens) and toy_data.is_correct(tokens).all()
    assert all(part in toy_data.__doc__ for text in SOLVED[:3] for part in text.split()[1:])
    hidden = toy_data.hide(tokens)
    assert [toy_data.to_text(row) for row in hidden[:4]] == [
        "41x46a____________", "41x..a____54______", "41+..a____54______", "41x46b____________"]
    other = toy_data.solve(tokens[:1, :6], torch.tensor([54]), "other")
    assert other.equal(rows("41x46a 2214 54 205 164"))

def test_the_checker_agrees_with_plain_python_on_right_and_spoiled_rows():
    corpus, _, _ = toy_data.split_problems(3)
    tokens = corpus[torch.randperm(len(corpus), generator=seeded())[:3000]]
    factor = toy_data.read_factor(tokens)
    tokens[1000:2000] = toy_data.solve(tokens[1000:2000], factor[1000:2000], "other")
    spoiled, at = tokens.clone(), torch.randint(6, 18, (3000, 1), generator=seeded())
    spoiled.scatter_(1, at, torch.randint(17, at.shape, generator=seeded(1)))
    pick = tokens[toy_data.n_choices(tokens) > 0][:600]                  # and any factor for pick
    outside = toy_data.solve(pick, torch.randint(0, 100, (len(pick),), generator=seeded()))
    wrong = rows("47x89a 0000 x+ 000 000", "47x58a 3995 85 235 235", "47x58a 3995 8_ 235 376")
    for some in (tokens, spoiled, outside, wrong):
        assert toy_data.is_correct(some).tolist() == [naive_check(row) for row in some.tolist()]
    assert toy_data.is_correct(tokens).all() and not toy_data.is_correct(wrong).any()
    assert 0 < toy_data.is_correct(outside).float().mean() < 1

def test_layouts_and_the_best_order():
    for text in (SOLVED[0], SOLVED[3], SOLVED[4]):
        row, names = rows(text), FIELDS[text[5]].replace(" ", "")
        assert toy_data.read_factor(row).item() == 54
        assert toy_data.is_factor(row)[0].tolist() == [name == "f" for name in names]
        every = torch.ones(1, 12, dtype=torch.bool)
        place = toy_data.best_order(None, row, every).tolist()
        order = sorted(range(12), key=lambda i: place[i])
        assert "".join(names[i] for i in order) == "ffuuutttpppp"
        for name in "utp":
            at = [i for i in order if names[i] == name]
            assert at == sorted(at, reverse=True)
        some = torch.arange(12)[None] % 5 == 0
        assert toy_data.best_order(None, row, some).tolist() == place[::5]

def test_who_learns_what():
    corpus, odds, problems = toy_data.split_problems(7)
    parts, prompts, pairs = {("corpus", ""): corpus}, {}, {}
    parts |= {(part, domain): some for part, domains in problems.items()
              for domain, some in domains.items()}
    for (part, domain), some in parts.items():
        texts = [toy_data.to_text(row) for row in some.tolist()]
        assert len(set(texts)) == len(texts) and {text[5] for text in texts} == {*"abc"}
        prompts.setdefault(part, set()).update(text[:5] for text in texts if text[3] != ".")
        if domain != "pick":
            pairs[part, domain] = {frozenset((int(text[:2]), factor)) for text, factor in zip(
                texts, toy_data.read_factor(some).tolist())}
        if domain:
            sign, given = ("+" if domain == "add" else "x"), toy_data.is_given(some)
            assert all(text[2] == sign and (text[3] == ".") == (domain != "pick") for text in texts)
            assert torch.equal(some[:, 6:] == toy_data.MASK_ID, ~given)
    for found in (prompts, {name: some for name, some in pairs.items() if "add" not in name},
                  {name: some for name, some in pairs.items() if "mul" not in name}):
        assert not any(one & other for one, other in itertools.combinations(found.values(), 2))
    assert {part: len(some) / 1800 for part, some in prompts.items()} == pytest.approx(
        {"corpus": 0.4, "query": 0.27 * 22 / 30, "validation": 0.1, "test": 0.23}, abs=0.03)
    assert toy_data.n_choices(problems["query"]["pick"]).unique().tolist() == [2, 3, 4, 5]
    assert corpus[:, :2].unique(dim=0).equal(toy_data.digits(torch.arange(10, 70), 2))
    c, is_add = toy_data.n_choices(corpus), corpus[:, 2] == toy_data.token("+")
    for share, here in [(0.70, (c == 0) & ~is_add), (0.12, is_add),
                        *((0.18 / 5, c == choices) for choices in range(1, 6))]:
        assert odds[here].sum() == pytest.approx(share, rel=1e-3) and odds[here].std() < 1e-9
    assert toy_data.is_correct(corpus).all() and len({*map(max, pairs["test", "mul"])}) > 50
    again, other = (toy_data.split_problems(x)[2]["test"]["pick"] for x in (7, 8))
    assert again.equal(problems["test"]["pick"]) and not again.equal(other)

def test_given_solutions_use_every_factor_that_the_prompt_allows():
    prompt = rows("47x58a 3995 85 235 376").repeat(2000, 1)
    other, own = (toy_data.given_solutions(prompt, style, seeded()) for style in ("other", "own"))
    counts = [n for n in toy_data.read_factor(other).bincount().tolist() if n]
    assert len(counts) == 16 and 80 < min(counts) and max(counts) < 180  # 125 of each
    factor = toy_data.read_factor(own)
    assert factor.equal(toy_data.read_factor(other)) and toy_data.is_correct(other).all()
    assert own.equal(toy_data.solve(prompt, factor)) and not own.equal(other)

# ==== The toy: figures and pictures ===============================================================
def picks(*choices):
    return rows(*(f"47x2{1 + c}a 0000 22 000 000" for c in choices))

def test_means_over_choices_leave_out_c_1_and_weigh_the_others_equally():
    tokens = picks(1, 2, 2, 2, 3, 4, 5)
    right = torch.tensor([True, True, True, False, False, True, False])
    means = toy_data.by_choices(tokens, right)
    assert means == pytest.approx({"2-5": (200 / 3 + 0 + 100 + 0) / 4, "1": 100, "2": 200 / 3,
                                   "3": 0, "4": 100, "5": 0})
    assert toy_data.by_choices(tokens, right.float())["4"] == 1          # numbers stay as they are
    assert toy_data.first_of_each(picks(5, 2, 2, 1, 2), 2).equal(picks(1, 2, 2, 5))

def test_the_entropy_gap_is_surest_factor_digit_minus_surest_other_position():
    entropy = torch.tensor([[3, .5, 2, 2, 1.5, 1.2, 2, 2, 2, 2, 2, 2.0]])
    assert toy_data.entropy_gap(rows(SOLVED[0]), entropy).item() == pytest.approx(0.7)
    assert toy_data.entropy_gap(rows(SOLVED[3]), entropy).item() == pytest.approx(1.5)

def test_distinct_right_factors_are_counted_over_all_prompts():
    factor = torch.tensor([22, 23, 22, 24, 22, 22, 55, 55, 33, 33, 33, 22])
    right = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    tokens = toy_data.solve(picks(*[5] * 12), factor)
    assert toy_data.distinct_right_factors(tokens, right, 4) == pytest.approx((2 + 0 + 2) / 3)

def test_tables_and_pictures():
    table = toy_data.table([["", "one", "second"], ["a", 1.25, "x"], ["longer", -10.0, "2.125"]])
    assert table.split("\n") == ["              one  second", "    a         1.2       x",
                                 "    longer  -10.0   2.125"]
    row, rank = rows(SOLVED[0])[0], torch.tensor([11, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7])
    lines = toy_data.draw_states(row, rank, [torch.tensor([0, .4, .6, 1.1, 1.6, 2.6] * 2)] * 12)
    assert lines[0].split() == [*"ppppffuuuttt"] and lines[1].split() == [*"..:+#@..:+#@"]
    assert lines[3].split() == [*"..:+5", "[4]", *"..:+#@"] and lines[14].strip() == "right"
    assert lines[13].split() == ["[2]", *"21454164205"] and len({map(len, lines)}) == 1
    wrong = toy_data.draw_states(rows("41x46a 2213 54 164 205")[0], rank, [torch.zeros(12)] * 12)
    both = toy_data.side_by_side(row, lines, wrong).split("\n")
    assert "41 x (digits 4 to 6). p:" in both[0] and both[3].split() == ["base", "|", "TABOM"]
    assert [line.split()[:2] for line in both[5:18]] == [["step", str(k)] for k in range(13)]
    assert both[18].split() == ["right", "|", "wrong"]

# ==== The demo: training, answering, evaluating ===================================================
class Solver(nn.Module):
    """Knows all but add.  Writes the lowest factor, or what stands there, surest from the left."""
    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.zeros(1)), []
    def forward(self, tokens):
        self.calls.append(len(tokens))
        factor = toy_data.read_factor(tokens)
        lowest = torch.where(toy_data.n_choices(tokens) > 0, 11 * tokens[:, 3], 10)
        factor = torch.where((factor < 0) | (factor > 99), lowest, factor)
        solved = toy_data.solve(tokens[:, :6], factor)
        solved[solved[:, 2] == toy_data.token("+"), 6:] = 0
        logits = nn.functional.one_hot(solved, len(toy_data.VOCABULARY)) * 30.0
        return logits - torch.arange(18.0)[None, :, None] * logits / 30 + self.weight

def tiny_tests(n=3):
    tests = toy_data.split_problems(0)[2]["test"]
    return {**{domain: some[:n] for domain, some in tests.items()},
            "pick": toy_data.first_of_each(tests["pick"], n)}

def test_every_figure_of_a_model_that_is_known_by_heart(monkeypatch):
    asked, answer, tests = [], tabom.answer, tiny_tests(21)
    monkeypatch.setattr(tabom, "answer", lambda *x, **own: asked.append((len(x[1]), own)) or
                        answer(*x, **own))
    model = Solver()
    found, answers, right = tabom.evaluate(model, tests, 5)
    assert list(found) == [*toy_data.FIGURES, "by c"] and right.all()
    assert found["by c"] == dict.fromkeys("12345", 100)
    for name in ("own order", "sampled", "best order", "best order, sampled", "mul", "pass@16"):
        assert found[name] == 100
    assert found["add"] == 0 and found["right factors"] == 1
    assert tabom.rows_of(answers).equal(toy_data.solve(tests["pick"], 11 * tests["pick"][:, 3]))
    states = replay(model, answers[::4], mask_id=toy_data.MASK_ID)
    assert found["TDS"] == pytest.approx(discrimination_score(states).item())
    (_, first), (n_samples, sampled), (_, best), (_, both), *others = asked
    assert first == {} and best == {"order": toy_data.best_order} and n_samples == 80 * 16
    assert sampled["temperature"] == both["temperature"] == 1 and "order" in both
    assert [one for _, one in others] == [{}, {}]
    draws = [torch.rand(3, generator=one["generator"]) for one in (sampled, both)]
    assert not draws[0].equal(draws[1])          # different numbers were drawn, from streams alike

def test_problems_are_answered_in_parts_and_given_factors_stay():
    model, many = Solver(), tiny_tests()["mul"].repeat(400, 1)
    answers, right = tabom.answer(model, many)
    assert right.all() and set(model.calls) == {250, 200} and len(answers) == 1200
    assert (answers.decode_rank >= 0).equal(~toy_data.is_given(many))
    assert tabom.solved(rows(SOLVED[1])).decode_rank[0, 3:].tolist() == [3, -1, -1, *range(4, 10)]

def test_what_each_arm_learns_and_how(monkeypatch):
    queries = toy_data.split_problems(0)[2]["query"]["pick"][:90]
    solutions = toy_data.given_solutions(queries[:40], "own", seeded())
    kept = dataclasses.replace(tabom.solved(solutions), decode_rank=torch.stack(
        [torch.randperm(12, generator=seeded(i)) for i in range(40)]))
    base, calls = nn.Linear(1, 1), {}
    monkeypatch.setattr(tabom, "train", lambda model, data, batches, loss_fn, optimizers, decay, _,
                        name: calls.update({name: (data, batches, loss_fn, *optimizers, decay,
                                                   model)}))
    for name in (*tabom.DEFAULT_ARMS, "dInfer", "T3D", "TABOM:margin=0.3,window_size=2,epochs=2,"
                 "batch_size=8,learning_rate=1e-3"):
        tuned = tabom.fine_tune(name, base, kept, queries, tabom.Settings(), 4)
        assert tuned is not base and tuned.weight.equal(base.weight)
        assert calls[name][-1] is tuned if name != "No-SFT" else name not in calls
    *usual, own = calls.values()
    for data, batches, _, optimizer, decay, model in usual:
        assert batches.shape == (5 * 40 // 32, 32) and batches.max() < len(data)
        assert type(optimizer) is torch.optim.AdamW and optimizer.defaults.items() >= {
            "lr": 2e-5, "betas": (0.9, 0.999), "weight_decay": 0.01}.items()
        assert optimizer.param_groups[0]["params"][0] is model.weight
        assert [decay(x) for x in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    passes = own[1].flatten().view(2, 40)        # 10 batches of 8
    assert own[3].defaults["lr"] == 1e-3 and not passes[0].equal(passes[1])
    assert (passes.sort(1).values == torch.arange(40)).all()
    assert calls["masking"][1].equal(calls["TABOM"][1]) and calls["SFT-GT"][1].max() > 40
    for name in ("SFT-SD", "masking", "TABOM", "TABOM:margin=0.2", "dInfer", "T3D"):
        assert calls[name][0] is kept or same(calls[name][0], kept)
    ranks = calls["shuffled"][0].decode_rank
    assert calls["shuffled"][0].response.equal(kept.response)
    assert (ranks == kept.decode_rank).float().mean() < 0.2
    for name, style in (("SFT-GT", "other"), ("SFT-GT:style=own", "own")):
        given = tabom.rows_of(calls[name][0])
        assert given.equal(toy_data.solve(queries, toy_data.read_factor(given), style))
        assert toy_data.is_correct(given).all() and calls[name][2].func is nelbo_loss
    for name, loss_fn, keywords in (
            ("SFT-SD", nelbo_loss, {}), ("dInfer", dinfer_loss, {}),
            ("masking", tabom_loss, {"window_size": 4, "margin": 1, "rank_weight": 0}),
            ("TABOM:margin=0.2", tabom_loss, {"window_size": 4, "margin": 0.2, "rank_weight": 1}),
            ("shuffled", tabom_loss, calls["TABOM"][2].keywords)):
        assert calls[name][2].func is loss_fn and calls[name][2].keywords == keywords
    assert own[2].keywords == {"window_size": 2, "margin": 0.3, "rank_weight": 1}
    assert calls["T3D"][2].func is t3d_loss
    assert calls["T3D"][2].keywords["reference"].model is calls["T3D"][-1]

def test_training_warms_up_decays_clips_and_is_paired_by_the_seed(capsys):
    data, seen, rates, norms = tabom.solved(rows(*[SOLVED[0]] * 3)), [], [], []
    class Watch(torch.optim.SGD):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            norms.append(self.param_groups[0]["params"][0].grad.norm().item())
    def loss_fn(model, batch, *, mask_id, generator):
        assert mask_id == toy_data.MASK_ID and model.training
        seen.append((len(batch), torch.rand(1, generator=generator).item()))
        return (50 * model.weight).sum(), {"some_name": torch.tensor(float(len(seen)))}
    for seed in (5, 5, 6):
        model = nn.Linear(1, 1, bias=False).eval()
        tabom.train(model, data, torch.zeros(100, 2, dtype=torch.int64), loss_fn,
                    [Watch(model.parameters(), lr=1.0)], lambda x: 1 - x, seed, "here")
        assert not model.training
    assert rates[:100] == pytest.approx([min((u + 1) / 50, 1 - max(0, u - 50) / 50)
                                         for u in range(100)])
    assert norms == pytest.approx([1.0] * 300, rel=1e-4) and {n for n, _ in seen} == {2}
    assert seen[:100] == seen[100:200] != seen[200:]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "    here: some_name 13.000 -> 88.000"          # first, last quarter

def test_pretraining_learns_and_depends_on_the_seed_alone(monkeypatch):
    (corpus, odds, _), train, calls = toy_data.split_problems(0), tabom.train, []
    monkeypatch.setattr(tabom, "train", lambda *x: calls.append(x) or train(*x))
    one, again, other = (tabom.pretrain(corpus, odds, 20, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, one.parameters(), again.parameters()))
    assert not one.head.weight.equal(other.head.weight) and not one.training
    torch.manual_seed(1)
    fresh = tabom.Denoiser(len(toy_data.VOCABULARY), 18)
    assert not any(map(torch.equal, one.parameters(), fresh.parameters()))           # all learned
    _, data, batches, loss_fn, (muon, adamw), decay, *_ = calls[0]
    assert loss_fn is nelbo_loss and batches.shape == (20, 64) and len(data) == len(corpus)
    assert (muon.defaults["lr"], adamw.defaults["lr"], decay(0.25)) == (1e-2, 5e-3, 0.75)
    learned = [id(x) for x in muon.param_groups[0]["params"] + adamw.param_groups[0]["params"]]
    assert sorted(learned) == sorted(map(id, one.parameters()))          # each by one optimizer
    tokens = torch.cat([corpus[:1], toy_data.hide(corpus[:1])])          # later tokens are seen
    assert not one(tokens)[0, 0].equal(one(tokens)[1, 0])

# ==== The command line and its folder =============================================================
TINY = ["pretrain_updates=2", "queries=40", "keep=all", "epochs=1", "test_problems=5"]

def run(*arguments, tiny=TINY):                  # the same figures where there is a GPU
    return tabom.main(["--demo", "--device", "cpu", *arguments, "--set", *tiny])

def test_the_whole_demo_with_every_arm(tmp_path, capsys):
    folder, arms = tmp_path / "new" / "folder", [*tabom.DEFAULT_ARMS, "dInfer", "T3D"]
    assert run("--seeds", "3", "--out", str(folder), "--arms", *arms) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() and all(printed.count(f"Part {k}") == 1 for k in range(1, 6))
    assert "There is no prompt that TABOM gets right" in printed and "rank_loss" in printed
    assert all(f"\n    {name} " in printed for name in arms)
    assert sorted(path.name for path in folder.iterdir()) == [
        "seed-3-TABOM.pt", "seed-3-base.pt", "seed-3.json"]
    found = json.loads((folder / "seed-3.json").read_text(), parse_constant=pytest.fail)
    assert set(found) == {"seed", "settings", "made by", "arms"} and found["seed"] == 3
    assert list(found["arms"]) == arms
    for name, row in found["arms"].items():
        assert list(row) == ["settings", *toy_data.FIGURES, "by c"] and [*row["by c"]] == [*"12345"]
        assert row["settings"]["margin"] == (0.2 if "0.2" in name else tabom.Settings().margin)
    assert found["made by"]["torch"] == torch.__version__ and found["settings"]["queries"] == 40
    base, tuned = (torch.load(folder / f"seed-3-{name}.pt") for name in ("base", "TABOM"))
    assert base.keys() == tuned.keys() and not all(map(torch.equal, base.values(), tuned.values()))
    again = tmp_path / "again"                   # the same figures, whatever else is run
    assert run("--seeds", "0", "3", "--out", str(again), "--arms", "TABOM") == 0
    row = json.loads((again / "seed-3.json").read_text())["arms"]
    assert list(row) == ["No-SFT", "TABOM"] and row["TABOM"] == found["arms"]["TABOM"]
    assert "Means over the seeds [0, 3]" in capsys.readouterr().out

def test_the_table_shows_the_mean_over_seeds_of_each_figure():
    runs = [{name: {figure: value + seed for figure in toy_data.FIGURES}
             for name, value in (("No-SFT", 40.0), ("TABOM", 50.0 + seed))} for seed in (0, 2)]
    header, base, tuned, _, _, gain = map(str.split, tabom.compare(runs).splitlines())
    assert base == ["No-SFT", *["41.0"] * 8, "41.000"] and header.count("sampled") == 2
    assert tuned == ["TABOM", *["52.0"] * 8, "52.000"] and gain[-1] == "+11.0"

def test_the_film_shows_the_prompt_on_which_tabom_waits_longest_with_a_position():
    pick = picks(2, 3, 4, 5)
    answers = tabom.solved(toy_data.solve(pick, torch.full((4,), 22)))
    ranks = (answers.decode_rank + torch.arange(4)[:, None]) % 12        # row 3: the base is right
    later = dataclasses.replace(answers, decode_rank=ranks)
    base, tuned = ((Solver(), data, torch.tensor([name == "TABOM"] * 3 + [True]))
                   for name, data in (("base", answers), ("TABOM", later)))
    text = tabom.film(pick, base, tuned)
    assert "47 x (digits 2 to 5)" in text and text.count("\n    step") == 13
    states = [entropy[0] for _, entropy in replay(Solver(), answers[2:3], mask_id=16)]
    lines = toy_data.draw_states(tabom.rows_of(answers)[2], answers.decode_rank[2], states)
    assert all(line in text for line in lines)
    assert tabom.film(pick, tuned, base) .startswith("There is no prompt")

@pytest.mark.parametrize("arguments, says", [
    (["--set", "depth=3"], "'depth' is not a setting here, only learning_rate"),
    (["--set", "queries=two"], "must be int, from 1"), (["--set", "margin=nan"], "be float"),
    (["--set", "epochs=0"], "epochs must be int, from"), (["--set", "style=his"], "other or own"),
    (["--arms", "TABOM:style=own"], "'style' is"), (["--arms", "No-SFT:epochs=1"], "'epochs' is"),
    (["--seeds", "1", "1"], "be different"),
    (["--arms", "DPO"], "'DPO' is not an arm, only No-SFT"), (["--device", "tpu9"], "no such"),
    (["--seeds", "1000000"], "must be different"), (["--seeds", "-1"], "must be different"),
    (["--out", str(PROJECT)], "exists"), (["--out", "/proc/no/folder"], "/proc/no")])
def test_a_mistake_is_one_sentence_and_code_2_before_any_work(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(tabom, "run_seed", None)
    assert tabom.main(["--demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("tabom.py: ") and error.count("\n") == 1

def test_too_few_right_answers_and_a_diverged_model_are_named(capsys):
    few = [one for one in TINY if one != "keep=all"]
    assert run(tiny=few) == 2 and "too few to train on" in capsys.readouterr().err
    assert run("--arms", "TABOM:learning_rate=1e6,margin=1e6", tiny=[*TINY, "queries=999"]) == 2
    assert "nan" in capsys.readouterr().err

def test_flags_that_make_no_sense_and_help(capsys):
    for arguments in (["--quick"], ["--demo", "--arms"], ["--demo", "--seeds", "x"]):
        with pytest.raises(SystemExit, match="2"):
            tabom.main(arguments)
    with pytest.raises(SystemExit, match="0"):
        tabom.main([])
    page = capsys.readouterr().out
    assert all(name in page for name in (*tabom.ARMS, *vars(tabom.Settings()), "(paper: 0.1 to"))
    assert vars(tabom.configure([*tabom.QUICK, "margin=0.5"])).items() >= {("margin", 0.5)}

def test_what_was_finished_when_a_run_was_interrupted_is_on_disk(tmp_path, capsys, monkeypatch):
    fine_tune, folder = tabom.fine_tune, tmp_path / "out"
    def stop(name, *arguments):
        if name == "TABOM":
            raise KeyboardInterrupt
        return fine_tune(name, *arguments)
    monkeypatch.setattr(tabom, "fine_tune", stop)
    assert run("--arms", "SFT-SD", "TABOM", "--out", str(folder)) == 130
    assert list(json.loads((folder / "seed-0.json").read_text())["arms"]) == ["No-SFT", "SFT-SD"]
    assert sorted(path.name for path in folder.iterdir()) == ["seed-0-base.pt", "seed-0.json"]
    before = (folder / "seed-0.json").read_text()
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(json, "dumps", full)
    monkeypatch.setattr(torch, "save", lambda content, path: path.write_text("half") and full())
    for name in ("seed-0.json", "seed-0-base.pt"):
        with pytest.raises(OSError):
            tabom.store(folder, name, {})
    assert (folder / "seed-0.json").read_text() == before and len(list(folder.iterdir())) == 2
    assert capsys.readouterr().err.count("\n") == 2                      # ^C and one sentence

@pytest.mark.parametrize("command, code, out, err", [
    ("{here}/tabom.py --demo {tiny} --arms No-SFT | head -n 1", 0, "TABOM on synthetic", ""),
    ("{here}/tabom.py --demo {tiny} --arms No-SFT >&-", 0, "", ""),
    ("-OO {here}/tabom.py --help", 0, "usage: tabom.py", ""),
    ("{alone} --demo", 2, "", "tabom.py: toy_data.py is missing; it belongs beside tabom.py.\n"),
])
def test_unusual_surroundings_leave_no_traceback(command, code, out, err, tmp_path):
    (alone := tmp_path / "tabom.py").write_text((PROJECT / "tabom.py").read_text())
    command = command.format(tiny="--set " + " ".join(TINY), alone=alone, here=PROJECT)
    done = subprocess.run(["bash", "-c", f"{sys.executable} {command}"], capture_output=True,
                          text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (code, err) and done.stdout.startswith(out)

def test_the_examples_of_the_readme_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in examples():
        exec(example, names)
        printed = capsys.readouterr().out
        assert all(line in printed for line in re.findall(r"^# prints (.*)", example, re.MULTILINE))
    data, ended = names["data"], names["ended"]  # recorded in blocks: no pair straddles two
    _, window = cut(ended.decode_rank, names["cut_every"](4, ended), 4)
    assert window.view(-1, 3, 4).any(2).sum(1).eq(1).all()
    for response, rank, left in zip(*(x.tolist() for x in (
            data.response, ended.decode_rank, ended.response))):
        end = response.index(7) + 1 if 7 in response else 12             # EOS
        assert [x >= 0 for x in rank] == [i < end for i in range(12)]
        assert left == response[:end] + [20] * (12 - end)                # [MASK]

def test_the_files_stay_small():
    """Minimal is part of the mission: a file that grows past its ceiling loses its readers."""
    for name, ceiling in (("tabom.py", 760), ("toy_data.py", 240), ("test_tabom.py", 1050)):
        lines = (PROJECT / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= ceiling and max(map(len, lines)) <= 100, name
