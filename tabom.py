# SPDX-License-Identifier: MIT
"""TABOM in one file: teach a masked diffusion language model the order in which it decodes.

Such a model is trained on uniformly random masks but decodes from easy to hard, so training and
inference visit different states.  TABOM (Self-Distilled Trajectory-Aware Boltzmann Modeling, arXiv
2605.11854; this file is unofficial) closes the gap:

    1. pretrain a denoiser by the book: hide random tokens, predict them           (Eq. 1)
    2. let it answer queries of a new domain, and record when each position was
       revealed: a trajectory                                                      (Eq. 2, Def. 1)
    3. keep the trajectories whose answer a checker accepts
    4. replay a state of a trajectory, train on the tokens that came next          (Eq. 9, term 1)
    5. and rank: what was revealed earlier should have the lower entropy           (Eq. 7-8)

    python tabom.py --demo            all of it on arithmetic, against five rivals and a control
    python tabom.py --demo --quick    the same chain in about a minute, only to see that it runs

Sections 1-9 are the method; they need torch and a callable `model(tokens) -> logits`, no more.
Sections 10-15 are the demo: a small model, one training loop, evaluation; toy_data.py has the rest.

Shapes: B sequences, L prompt tokens, N response tokens of which W lie in a window, V vocabulary,
D width.  x_t is a response with some tokens replaced by [MASK].  Entropies are in nats.
Simplified: 0.3 million parameters, arithmetic for language; all weights are fine-tuned (paper:
LoRA); the entropies of a window are all measured in one state, at the cut (Eq. 5: each just before
its reveal); and the demo collects in random order by default, so that the checker selects orders.
"""
# ==== The method begins here: sections 1-9 are one block to copy; they need nothing but torch =====
import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# == 1. The state: one integer per position ========================================================
# A trajectory is a response and, for each position, the rank at which it was revealed.  That one
# integer gives back the states on the way, one token after the other; no masks need to be stored.

@dataclass(frozen=True)
class Trajectories:
    """Decoded responses that remember the order in which they were written (Def. 1).

    prompt      (B, L) int64
    response    (B, N) int64
    decode_rank (B, N) int64: 0 = revealed first; in each row a permutation of 0 .. n-1 over its n
                valid positions, and -1 at the others.  The others keep what `response` holds (a
                given token, padding, mask_id) and are never trained, ranked or counted.
    entropy     (B, N) float, nats, of each position just before it was revealed; breaks ties
    A wrong shape or dtype raises ValueError; `validate` looks at the values too.  As one file:
    torch.save(vars(trajectories), "x.pt") and Trajectories(**torch.load("x.pt")).
    """
    prompt: Tensor
    response: Tensor
    decode_rank: Tensor
    entropy: Tensor

    def __post_init__(self):
        shapes = [tuple(tensor.shape) for tensor in vars(self).values()]
        require([len(shape) for shape in shapes] == [2] * 4 and shapes[0][0] == shapes[1][0]
                and shapes[1] == shapes[2] == shapes[3],
                f"prompt must be (B, L) and the other three fields (B, N), not {shapes}.")
        dtypes = [tensor.dtype for tensor in vars(self).values()]
        require(dtypes[:3] == [torch.int64] * 3 and dtypes[3].is_floating_point, "prompt, response "
                f"and decode_rank must be int64, entropy floating-point, not {dtypes}.")

    def __getitem__(self, rows):
        """Rows by boolean mask, index tensor or slice."""
        return Trajectories(*(field[rows] for field in vars(self).values()))

    def __len__(self):
        return len(self.response)

    def to(self, device):
        return Trajectories(*(field.to(device) for field in vars(self).values()))

    def only(self, valid):
        """Leave out positions that are not `valid` (B, N) bool, padding behind the end for example.
        They stay as they are, visible; write mask_id there if the model should not see them."""
        rank = ranks_from_steps(self.decode_rank.masked_fill(~valid, -1), self.entropy)
        return replace(self, decode_rank=rank, entropy=self.entropy.masked_fill(~valid, 0))

    @property
    def n_decoded(self):
        """(B,) n, the valid positions of each row."""
        return (self.decode_rank >= 0).sum(1)

def require(fact, message):
    if not fact:
        raise ValueError(message)

def is_whole(value, lowest):
    return hasattr(value, "__index__") and value >= lowest

def rank_in_row(values):
    """(B, N) -> (B, N) int64: 0 for the smallest of a row; of equal ones the leftmost is first."""
    return values.argsort(dim=1, stable=True).argsort(dim=1)

def ranks_from_steps(step, entropy):
    """(B, N) step of each reveal, -1 = never -> decode_rank.  Ties: by entropy, then position."""
    turn = step * step.shape[1] + rank_in_row(entropy)
    turn = turn.masked_fill(step < 0, torch.iinfo(torch.int64).max)
    return rank_in_row(turn).masked_fill(step < 0, -1)

def segment_masks(decode_rank, n_visible, window_size):
    """Cut each trajectory after `n_visible` reveals -> visible, masked, window: (B, N) bool.

    decode_rank (B, N); n_visible and window_size: an int, or (B,) with one value per row.
    U_t, M_t and Delta in the paper.  The window is the next `window_size` ranks, fewer at the end
    of a response, so that every rank, the last one included, falls into some window.
    """
    for name, value, lowest in (("n_visible", n_visible, 0), ("window_size", window_size, 1)):
        require(value.shape == decode_rank.shape[:1] if isinstance(value, Tensor)
                else is_whole(value, lowest), f"{name} must be a whole number of at least {lowest} "
                f"or a tensor of the shape ({len(decode_rank)},).")
    n_visible, window_size = (value[:, None] if isinstance(value, Tensor) else value
                              for value in (n_visible, window_size))     # (B, 1) or int
    masked = (decode_rank >= 0) & (decode_rank >= n_visible)
    window = masked & (decode_rank - n_visible < window_size)
    return ~masked, masked, window

def response_logits(model, prompt, x_t, at=None):
    """The only call of a model: logits of x_t (B, N), all of them or `at` some positions (B, W)."""
    tokens = torch.cat([prompt, x_t], 1)
    require(len(tokens) > 0, "there are no rows to show to the model: did the checker keep any?")
    logits = model(tokens)                                               # (B, L+N, V)
    require(isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == tokens.shape,
            f"the model must return a tensor of logits {(*tokens.shape, 'V')} (output.logits).")
    if at is None:
        return logits[:, prompt.shape[1]:]                               # (B, N, V)
    row_start = torch.arange(len(at), device=at.device)[:, None] * tokens.shape[1]
    flat = (row_start + prompt.shape[1] + at).flatten()
    return logits.flatten(0, 1).index_select(0, flat).unflatten(0, at.shape)   # (B, W, V)

def ban_mask(logits, mask_id):
    """If the vocabulary has an entry for [MASK], make it impossible: no response contains it."""
    if mask_id >= logits.shape[-1]:
        return logits
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(is_mask, -torch.inf)

def row_mean(values, chosen):
    """(B, N), (B, N) bool -> (B,): mean over the chosen positions of a row, 0 without any."""
    return torch.where(chosen, values, 0).sum(1) / chosen.sum(1).clamp(min=1)

def draw_below(limit, generator):
    """(B,) limits -> (B,) int64, each uniform over 0 .. limit-1."""
    draw = torch.rand(limit.shape, generator=generator, device=limit.device, dtype=torch.float32)
    return (draw * limit).long()

# == 2. Predictive entropy: how unsure the model is of a position ==================================
# The quantity behind everything here: the decoder sorts by it, the ranking loss compares it, the
# discrimination score is its spread.

def predictive_entropy(logits):
    """H = -sum_v p(v) log p(v) over the whole vocabulary: (..., V) -> (...) float32, nats.

    An entry of -inf is a banned token and contributes exactly 0, also to the gradient.
    """
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    log_p = log_p.clamp(min=torch.finfo(torch.float32).min)              # 0 * -inf would be nan
    return -(log_p.exp() * log_p).sum(-1)

# == 3. Decode from easy to hard, and remember the order (Eq. 2, Def. 1) ===========================
# Start fully masked.  At each step ask the model about every masked position and write the surest
# ones.  Noting the step of each position is all it takes to record a trajectory.

ORDERS = ("entropy", "confidence", "margin", "random")

def entropy_and_difficulty(logits, mask_id, order="entropy", part_size=2 ** 21):
    """(B, N, V) -> entropy and what the order sorts by, the easiest lowest: (B, N) each."""
    entropy = torch.empty(logits.shape[:2], device=logits.device, dtype=torch.float32)
    difficulty = torch.empty_like(entropy)
    n_positions = max(1, part_size // max(1, logits[:, :1].numel()))
    for start in range(0, logits.shape[1], n_positions):                 # in parts, to save memory
        some = slice(start, start + n_positions)
        part = ban_mask(logits[:, some], mask_id)
        entropy[:, some] = difficulty[:, some] = predictive_entropy(part)
        if order == "confidence":
            difficulty[:, some] = -part.softmax(-1, dtype=torch.float32).amax(-1)
        if order == "margin":
            best, second = part.softmax(-1, dtype=torch.float32).topk(2).values.unbind(-1)
            difficulty[:, some] = second - best
    return entropy, difficulty

def pick_tokens(logits, temperature, generator):
    """(..., V) -> (...): the likeliest tokens, or samples if the temperature is above 0."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    race = p / torch.empty_like(p).exponential_(generator=generator)
    return race.argmax(-1)                       # is token v with probability p(v)

@torch.no_grad()
def decode(model, prompt, response_length, *, mask_id, order="entropy", tokens_per_step=1,
           temperature=0.0, block_length=None, generator=None, given=None, valid=None):
    """Answer prompts (B, L) -> `Trajectories` with responses of `response_length` = N tokens.

    order            what counts as easy: the lowest "entropy" (Eq. 2), the highest top probability
                     ("confidence"), the largest gap between the top two ("margin"), "random", or a
                     tensor (N,) that fixes the order, lowest first.  Of equal ones the leftmost.
    tokens_per_step  positions revealed per forward pass, ranked among themselves by entropy
    temperature      0 is greedy.  It changes which token is written, never which position is easy.
    block_length     finish a block of positions before the next (semi-autoregressive, as LLaDA)
    generator        seeds sampling and the random order; on the device of the prompt
    given            (B, N) int64, for infilling: tokens that stay, and `mask_id` where to decode
    valid            (B, N) bool: positions that are False keep what they hold, [MASK] or given
    A row with nothing to decode comes back as it is.  Raises ValueError for a wrong setting or nan.
    """
    if isinstance(order, Tensor):
        require(order.shape == (response_length,) and order.isfinite().all(),
                f"an order tensor must hold {response_length} finite numbers.")
    else:
        require(order in ORDERS, f"order must be one of {', '.join(ORDERS)}, or a tensor.")
    block_length = response_length if block_length is None else block_length
    for name, value, lowest in (("response_length", response_length, 1), ("mask_id", mask_id, 0),
                                ("tokens_per_step", tokens_per_step, 1),
                                ("block_length", block_length, 1)):
        require(is_whole(value, lowest), f"{name} must be a whole number of at least {lowest}.")
    require(0 <= temperature < float("inf"), f"temperature must be 0 or more, not {temperature}.")
    require(prompt.dim() == 2 and prompt.dtype == torch.int64, "the prompt must be (B, L) int64.")
    require(not (prompt == mask_id).any(), f"the prompt contains mask_id ({mask_id}).")
    shape, device = (len(prompt), response_length), prompt.device
    for name, tensor, dtype in (("given", given, torch.int64), ("valid", valid, torch.bool)):
        require(tensor is None or (tensor.shape == shape and tensor.dtype == dtype),
                f"{name} must have the shape {shape} and be {dtype}.")

    response = prompt.new_full(shape, mask_id) if given is None else given.clone()
    masked = response == mask_id                 # from here on tracked, not read off the tokens
    masked = masked if valid is None else masked & valid
    step_of = torch.full_like(response, -1)
    reveal_entropy = torch.zeros(shape, device=device, dtype=torch.float32)
    block = torch.arange(response_length, device=device) // block_length
    in_block = torch.zeros_like(response).index_add(1, block, masked.long())   # per row and block
    n_steps = -(-in_block // tokens_per_step)                            # rounded up
    for step in range(max(n_steps.sum(1).tolist(), default=0)):
        logits = response_logits(model, prompt, response)                # (B, N, V)
        entropy, difficulty = entropy_and_difficulty(logits, mask_id, order)
        if isinstance(order, Tensor):
            difficulty = order.to(entropy).expand(shape)
        elif order == "random":
            difficulty = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        current_block = torch.where(masked, block, response_length).amin(1, keepdim=True)
        candidates = masked & (block == current_block)
        at = difficulty.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)
        at = at[:, :tokens_per_step]                                     # Eq. 2
        chosen = torch.zeros_like(masked).scatter(1, at, candidates.gather(1, at))
        logits = logits.take_along_dim(at[..., None], 1)                 # (B, tokens_per_step, V)
        tokens = pick_tokens(ban_mask(logits, mask_id), temperature, generator)
        response = torch.where(chosen, response.scatter(1, at, tokens), response)
        step_of = step_of.masked_fill(chosen, step)
        reveal_entropy = torch.where(chosen, entropy, reveal_entropy)
        masked = masked & ~chosen
    require(reveal_entropy.isfinite().all() and not masked.any(), "the logits were nan or +inf.")
    return Trajectories(prompt, response, ranks_from_steps(step_of, reveal_entropy), reveal_entropy)

# == 4. Training by the book: uniform masking (Eq. 1) ==============================================
# Hide a random share of the response and predict it: the NELBO, negative evidence lower bound.  Any
# set of positions may be visible, but the decoder above visits only a few, easy-to-hard ones.
# This is the gap that TABOM closes.

def token_nll(logits, tokens):
    """-log p of each token: (B, W, V), (B, W) -> (B, W) float32, nats."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    return -log_p.gather(-1, tokens[..., None]).squeeze(-1)

def nelbo_loss(model, trajectories, *, mask_id, generator=None, mask_ratio=None):
    """Eq. 1: mean over the masked positions of a row, then over rows; the order is not used.

    Each row draws a mask ratio from 0 .. 1, unless `mask_ratio` sets it for all, and masks each
    of its valid positions with that probability, but at least one.  Returns loss, metrics.
    """
    require(0 <= (mask_ratio or 0) <= 1, f"mask_ratio must be from 0 to 1, not {mask_ratio}.")
    response, valid = trajectories.response, trajectories.decode_rank >= 0
    ratio, draw = (torch.rand(len(response), n, generator=generator, device=response.device,
                              dtype=torch.float32) for n in (1, response.shape[1]))
    draw = draw.masked_fill(~valid, torch.inf)
    ratio = ratio if mask_ratio is None else torch.full_like(ratio, mask_ratio)
    masked = valid & ((draw < ratio) | (draw == draw.amin(1, keepdim=True)))
    x_t = response.masked_fill(masked, mask_id)
    logits = ban_mask(response_logits(model, trajectories.prompt, x_t), mask_id)       # (B, N, V)
    nll = token_nll(logits, response.masked_fill(~masked, 0))            # 0: not counted
    loss = row_mean(nll, masked).mean()                                  # Eq. 1
    return loss, {"nll": loss.detach()}

# == 5. The ranking loss (Eq. 7-8) =================================================================
# Boltzmann: ideally the model visits a state with probability proportional to exp(-beta * sum of
# the entropies its tokens had before they were revealed).  Fitting that needs a partition function.
# Comparing two states that differ in one token does not: if r was revealed before s, the state with
# r should be the likelier, so r should have the lower entropy (Lemma 1).  gamma absorbs beta.

def pairwise_rank_loss(entropy, decode_rank, window, margin):
    """Eq. 8: mean over the window's pairs of max(0, h(r) - h(s) + margin), then over rows.

    h = entropy (B, N) nats; decode_rank (B, N); window (B, N) bool; margin (gamma) nats.
    A pair (r, s) has r revealed before s; a row with fewer than two window positions counts 0.
    Returns loss and pair_accuracy, the detached share of pairs with h(r) < h(s); chance is 0.5.
    """
    shapes = [tuple(tensor.shape) for tensor in (entropy, decode_rank, window)]
    require(len(set(shapes)) == 1, f"entropy, decode_rank, window need one shape, not {shapes}.")
    require(margin >= 0, f"margin must be 0 nats or more, not {margin}.")
    pairs = window[:, :, None] & window[:, None, :]                      # (B, N, N)
    pairs &= decode_rank[:, :, None] < decode_rank[:, None, :]           # pairs[b, earlier, later]
    excess = entropy[:, :, None] - entropy[:, None, :]                   # h(r) - h(s)
    loss = row_mean((excess + margin).relu().flatten(1), pairs.flatten(1)).mean()      # Eq. 8
    pair_accuracy = ((excess < 0) & pairs).sum() / pairs.sum().clamp(min=1)
    return loss, pair_accuracy

# == 6. TABOM (Eq. 9) ==============================================================================
# Replay a recorded state: show exactly what had been revealed before a random cut.  Then teach two
# things about the tokens that came next: *what* they are, and *in which order* they came.

def window_at_cut(model, trajectories, n_visible, window_size, mask_id):
    """Show the state after `n_visible` reveals -> logits (B, W, V) of its window, in reveal order,
    and response, decode_rank and window (B, W) at these W positions (False past the last rank)."""
    response, decode_rank = trajectories.response, trajectories.decode_rank
    _, masked, window = segment_masks(decode_rank, n_visible, window_size)
    x_t = response.masked_fill(masked, mask_id)
    at = decode_rank.masked_fill(~window, response.shape[1]).argsort(1)  # the window comes first
    at = at if isinstance(window_size, Tensor) else at[:, :window_size]  # (B, W)
    logits = ban_mask(response_logits(model, trajectories.prompt, x_t, at), mask_id)
    response = response.masked_fill(~window, 0)                          # 0: not counted
    return logits, *(tensor.gather(1, at) for tensor in (response, decode_rank, window))

def tabom_loss(model, trajectories, *, mask_id, generator=None, window_size, margin, rank_weight,
               n_visible=None):
    """Eq. 9: cross-entropy of the window + rank_weight (lambda) * its ranking loss; row means.

    window_size in tokens; margin in nats; n_visible (B,): where to cut, by default drawn from
    0 .. n-1.  Raises ValueError for a setting out of range.  Returns loss, metrics.
    """
    require(margin >= 0 and rank_weight >= 0, "margin and rank_weight must be 0 or more.")
    if n_visible is None:
        n_visible = draw_below(trajectories.n_decoded, generator)
    logits, tokens, decode_rank, window = window_at_cut(model, trajectories, n_visible, window_size,
                                                        mask_id)
    nll = row_mean(token_nll(logits, tokens), window).mean()
    entropy = predictive_entropy(logits)         # at the cut; in Eq. 5 each just before its turn
    rank_loss, pair_accuracy = pairwise_rank_loss(entropy, decode_rank, window, margin)
    loss = nll + rank_weight * rank_loss                                 # Eq. 9
    return loss, {"nll": nll.detach(), "rank_loss": rank_loss.detach(),
                  "pair_accuracy": pair_accuracy}

# == 7. The rival arms =============================================================================
# Each is one function of the same form.  SFT-GT and SFT-SD are `nelbo_loss`, on reference solutions
# and on the model's own valid responses.

def trajectory_loss(model, trajectories, *, mask_id, generator=None, window_size, n_visible=None):
    """Trajectory masking: Eq. 9 with lambda = 0, what comes next but not in which order."""
    return tabom_loss(model, trajectories, mask_id=mask_id, generator=generator, margin=0.0,
                      rank_weight=0.0, window_size=window_size, n_visible=n_visible)

def dinfer_loss(model, trajectories, *, mask_id, generator=None, times=None):
    """dInfer (arXiv 2510.08666): show a state, supervise all that is revealed until a later one.

    times: (start, end), each (B,), the tokens visible in the two states; by default two different
    numbers from 0 .. n, every pair equally likely.  Returns loss, metrics.
    """
    if times is None:
        n = trajectories.n_decoded
        one = draw_below(n + 1, generator)
        other = (one + 1 + draw_below(n, generator)) % (n + 1)           # any number but `one`
        times = torch.minimum(one, other), torch.maximum(one, other)
    start, end = times
    logits, tokens, _, window = window_at_cut(model, trajectories, start, end - start, mask_id)
    loss = row_mean(token_nll(logits, tokens), window).mean()
    return loss, {"nll": loss.detach()}

def t3d_loss(model, trajectories, *, mask_id, generator=None, reference, a=0.5, b=0.1, c=0.2):
    """T3D (arXiv 2602.12262): prefer the recorded tokens x0 to y^, what a reference would write.

    With l(y) = mean log p(y) over the masked tokens of a random cut, and L_path = the sum of their
    -log p(x0), weighted from 1 for the next one linearly down to 1/n_masked for the last:
    L = -log sigma(b [l(x0) - l_ref(x0)]) - a log(1 - sigma(b [l(y^) - l_ref(y^)])) + c L_path.
    reference: a callable like `model`, see `LaggedCopy`.  Returns loss, metrics.
    """
    require(min(a, b, c) >= 0, f"a, b and c must be 0 or more, not {a}, {b}, {c}.")
    prompt, response, n_decoded = trajectories.prompt, trajectories.response, trajectories.n_decoded
    n_visible = draw_below(n_decoded, generator)
    _, masked, _ = segment_masks(trajectories.decode_rank, n_visible, 1)
    x_t, n_masked = response.masked_fill(masked, mask_id), masked.sum(1).clamp(min=1)
    logits = ban_mask(response_logits(model, prompt, x_t), mask_id)      # (B, N, V)
    with torch.no_grad():
        reference_logits = ban_mask(response_logits(reference, prompt, x_t), mask_id)
    x_0 = response.masked_fill(~masked, 0)                               # 0: not counted

    def log_ratio(y):                                                    # l(y) - l_ref(y), (B,)
        return row_mean(token_nll(reference_logits, y) - token_nll(logits, y), masked)

    rejected = reference_logits.argmax(-1)                               # y^
    preference = -F.logsigmoid(b * log_ratio(x_0)) - a * F.logsigmoid(-b * log_ratio(rejected))
    path_weight = (n_decoded[:, None] - trajectories.decode_rank) / n_masked[:, None]
    path = torch.where(masked, path_weight * token_nll(logits, x_0), 0).sum(1)
    loss = (preference + c * path).mean()
    return loss, {"preference": preference.mean().detach(), "path": path.mean().detach()}

class LaggedCopy:
    """A frozen copy of an nn.Module that catches up every `every` calls: the reference of T3D."""
    def __init__(self, model, every=10):
        self.model, self.frozen = model, copy.deepcopy(model).eval()
        self.every, self.calls = every, 0

    @torch.no_grad()
    def __call__(self, tokens):
        if self.calls % self.every == 0:
            self.frozen.load_state_dict(self.model.state_dict())
        self.calls += 1
        return self.frozen(tokens)

# == 8. Trajectory discrimination score (Eq. 10-11) ================================================
# How well a state tells easy from hard: the variance of the entropies of what is still masked.  A
# model equally unsure of every position scores 0 and might as well decode at random.

def trajectory_discrimination_score(entropy, masked):
    """Eq. 10: population variance over masked positions, (B, N), (B, N) bool -> (B,) in nats
    squared; 0 for a state with fewer than two."""
    mean = row_mean(entropy, masked)[:, None]
    return row_mean((entropy - mean) ** 2, masked)

@torch.no_grad()
def replay(model, trajectories, *, mask_id):
    """Yield x_t, masked and entropy, each (B, N), of the states with 0, 1, .. N tokens revealed."""
    for n_visible in range(trajectories.response.shape[1] + 1):
        _, masked, _ = segment_masks(trajectories.decode_rank, n_visible, 1)
        x_t = trajectories.response.masked_fill(masked, mask_id)
        logits = response_logits(model, trajectories.prompt, x_t)        # (B, N, V)
        yield x_t, masked, entropy_and_difficulty(logits, mask_id)[0]

def discrimination_curve(model, trajectories, *, mask_id, eos_id=None):
    """Score of each state of recorded trajectories -> score (B, N+1), counted (B, N+1) bool.

    Column k has k tokens revealed.  A state counts if it masks two positions or more; those behind
    an `eos_id` that is already written are left out.  In nats squared.  The curve is the mean of
    each column over counted rows; Eq. 11 is the mean of all counted entries.
    """
    scores, counted = [], []
    for x_t, masked, entropy in replay(model, trajectories, mask_id=mask_id):
        if eos_id is not None:
            masked = masked & ((x_t == eos_id).cumsum(1) == 0)
        scores.append(trajectory_discrimination_score(entropy, masked))
        counted.append(masked.sum(1) >= 2)
    return torch.stack(scores, 1), torch.stack(counted, 1)

# == 9. Trajectories from and to files =============================================================

def from_decoding_order(prompt, response, decoding_order, entropy=None):
    """Trajectories from other people's data: the step at which each position was written.

    decoding_order (B, N), lists or tensor: counts up from the first step; -1 = never decoded.
    Equal steps are ordered by entropy (B, N) if there is one, else by position.
    """
    step = torch.as_tensor(decoding_order, device=response.device)
    require(step.shape == response.shape and not step.is_floating_point(), "decoding_order must "
            f"hold one whole number for each token of {tuple(response.shape)}.")
    entropy = torch.zeros(step.shape) if entropy is None else torch.as_tensor(entropy)
    entropy = entropy.to(step.device, torch.float32)
    return Trajectories(prompt, response, ranks_from_steps(step.long(), entropy), entropy)

def validate(trajectories, mask_id, vocabulary_size):
    """Look at every value and raise ValueError for a wrong one.  Call it once per data set: the
    losses check shapes and settings only, since to look at values makes a GPU wait."""
    prompt, response, decode_rank, entropy = vars(trajectories).values()
    n, valid = response.shape[1], decode_rank >= 0
    sorted_rank = torch.arange(n, device=response.device) - (n - valid.sum(1, keepdim=True))
    require((decode_rank.sort(1).values == sorted_rank.clamp(min=-1)).all(),
            "decode_rank must hold 0 .. n-1 once each in every row, and -1 elsewhere.")
    for name, tokens, ranked in (("prompt", prompt, True), ("response", response, valid)):
        is_mask = tokens == mask_id              # allowed where nothing is ranked
        require(not (is_mask & ranked).any(), f"the {name} contains mask_id ({mask_id}).")
        require((is_mask | (tokens >= 0) & (tokens < vocabulary_size)).all(),
                f"the {name} contains a token outside of 0 .. {vocabulary_size - 1}.")
    require(entropy.isfinite().all() and (entropy >= 0).all(), "an entropy is negative or nan.")

# ==== The method ends here.  Below: the demo, a small model on synthetic arithmetic ===============
import math
import os
import sys
import time
from functools import partial
from torch import nn
from tqdm import tqdm

try:
    import toy_data              # the problems, the settings with their reasons, what is printed
    from toy_data import DemoError
except ModuleNotFoundError:      # this file was copied alone: all but the demo works
    toy_data = None

# == 10. The denoiser ==============================================================================
# A plain bidirectional transformer.  No time input: the mask pattern says how much is left to do.

class Denoiser(nn.Module):
    """tokens (B, L+N) int64 -> logits (B, L+N, V).  [MASK] is token V, an input without output."""
    def __init__(self, vocabulary_size, length, layers, width, heads):
        super().__init__()
        self.token = nn.Embedding(vocabulary_size + 1, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:                 # with GPT-2's 0.02 it learns more slowly
                nn.init.normal_(weight, std=width ** -0.5)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]  # (B, L+N, D)
        for block in self.blocks:
            x = block(x)                         # attends to both sides: there is no causal mask
        return self.head(self.norm(x))                                   # (B, L+N, V)

# == 11. One training loop for pretraining and for every arm =======================================

def random_stream(seed, purpose, device="cpu"):
    """A generator for each (seed, purpose): one never shifts another, so arms are paired."""
    purposes = ("batches", "masks", "collect", "references", "evaluate")
    return torch.Generator(device).manual_seed(len(purposes) * seed + purposes.index(purpose))

# A bar on stderr for what takes longer than two seconds, if it is a terminal.
progress = partial(tqdm, leave=False, delay=2, disable=None)

def train(model, data, loss_fn, *, updates, batch_size, learning_rate, warmup, seed, label,
          weight=None, loss_lines=0):
    """AdamW with warm-up, cosine decay and clipping -> the model, trained in place.
    weight (n,): odds of drawing each row; loss_lines: how many lines to print on the way."""
    device = data.response.device
    batches, masks = random_stream(seed, "batches"), random_stream(seed, "masks", device)
    weight = torch.ones(len(data)) if weight is None else weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(
        (update + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * update / updates)))
    model.train()
    for update in progress(range(1, updates + 1), label):
        rows = torch.multinomial(weight, batch_size, replacement=True, generator=batches).to(device)
        loss, _ = loss_fn(model, data[rows], mask_id=toy_data.MASK_ID, generator=masks)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if loss_lines and update % max(1, updates // loss_lines) == 0:
            tqdm.write(f"    update {update:5d}  loss {loss.item():.3f}")
    return model.eval()

# == 12. Self-distillation and the arms ============================================================
# The base answers the queries of the new domain and a checker keeps what is right: that is all the
# data there is.  SFT-GT gets a reference solution for the query of every kept answer instead.

ARMS = ("SFT-GT", "SFT-SD", "dInfer", "T3D", "trajectory", "TABOM")

def arm_loss(arm, model, config):
    """The loss of an arm; SFT-GT and SFT-SD: Eq. 1."""
    return {"dInfer": dinfer_loss,
            "T3D": partial(t3d_loss, reference=LaggedCopy(model)),
            "trajectory": partial(trajectory_loss, window_size=config.window_size),
            "TABOM": partial(tabom_loss, window_size=config.window_size, margin=config.margin,
                             rank_weight=config.rank_weight)}.get(arm, nelbo_loss)

def as_trajectories(prompt, response, given):
    """Solutions as Trajectories.  Nobody decoded them, so their ranks just count from the left."""
    return from_decoding_order(prompt, response, -given.long())

def reorder(trajectories, how, generator):
    """Controls: the same responses with "reversed" ranks, or "shuffled" within each of them."""
    rank = trajectories.decode_rank
    shuffled = torch.rand(rank.shape, generator=generator, device=rank.device)
    turn = {"recorded": rank, "reversed": -rank, "shuffled": shuffled}[how]
    step = rank_in_row(turn).masked_fill(rank < 0, -1)
    return replace(trajectories, decode_rank=ranks_from_steps(step, trajectories.entropy))

def answer(model, domain, problems, generator, **settings):
    """Decode problems (n, 2) -> Trajectories, correct (n,) bool.  Settings as in `decode`."""
    parts = []
    for some in progress(problems.split(1000), f"decoding {domain}"):
        prompt, response, given = toy_data.write_solutions(domain, *some.unbind(1))
        template = response.masked_fill(~given, toy_data.MASK_ID)
        parts.append(decode(model, prompt, response.shape[1], mask_id=toy_data.MASK_ID,
                            given=template, generator=generator, **settings))
    answers = Trajectories(*map(torch.cat, zip(*(vars(part).values() for part in parts))))
    return answers, toy_data.is_correct(domain, answers.prompt, answers.response)

def self_distil(base, problems, config, seed):
    """Def. 1 -> the answers the checker keeps (Trajectories), and the problem of each (n, 2)."""
    asked = problems[torch.arange(config.queries, device=problems.device) % len(problems)]
    rollouts, _ = answer(base, config.new_domain, asked,
                         random_stream(seed, "collect", problems.device),
                         temperature=config.collect_temperature, order=config.collect_order)
    keep = toy_data.is_valid(config, rollouts.prompt, rollouts.response)
    keep = toy_data.first_of_each(keep, len(problems), config.answers_per_problem)
    if keep.sum() < 16:
        raise DemoError(f"only {keep.sum()} of {config.queries} rollouts are valid, too few to "
                        "train on: raise pretrain_updates or queries with --set.")
    return rollouts[keep], asked[keep]

def training_data(arm, distilled, asked, config, seed):
    """What an arm trains on, row by row for the same problems -> Trajectories."""
    if arm == "SFT-GT":
        return as_trajectories(*toy_data.write_references(
            config.new_domain, asked, config.reference_hand, random_stream(seed, "references")))
    return reorder(distilled, config.ranks, random_stream(seed, "collect", asked.device))

# == 13. Evaluation ================================================================================
# Always the last checkpoint.  A new domain of few prompts with many right answers is sampled many
# times; accuracy is kept per problem, to compare arms in pairs.

say = partial(print, flush=True)

def percent(correct):
    return 100 * correct.float().mean().item()

def take_test(model, domain, problems, config, seed, **settings):
    """Problems -> Trajectories, correct.  Sampled as in config in the new domain, else greedy."""
    temperature = 0.0
    if domain == config.new_domain:
        problems, temperature = problems.repeat_interleave(config.samples, 0), config.temperature
    return answer(model, domain, problems, random_stream(seed, "evaluate", problems.device),
                  temperature=temperature, **settings)

def evaluate(model, tests, held_out, config, seed):
    """All figures of one model, and its answers (Trajectories, correct) in the new domain."""
    new = config.new_domain
    answers, correct = take_test(model, new, tests[new], config, seed)
    two_tokens = take_test(model, new, tests[new], config, seed, tokens_per_step=2)[1]
    best_order = take_test(model, new, tests[new], config, seed, order=toy_data.BEST_ORDER)[1]
    old = {domain: percent(take_test(model, domain, problems, config, seed)[1])
           for domain, problems in tests.items() if domain != new}
    score, counted = discrimination_curve(model, answers, mask_id=toy_data.MASK_ID)
    curve = (score * counted).sum(0) / counted.sum(0)                    # nan where no state counts
    with torch.no_grad():
        _, metrics = trajectory_loss(
            model, held_out, mask_id=toy_data.MASK_ID, window_size=config.window_size,
            generator=random_stream(seed, "masks", held_out.response.device))
    factors, effective = toy_data.count_factors(answers.response, answers.decode_rank)
    figures = {
        "new": percent(correct), **old, "old": sum(old.values()) / len(old),
        "2 tok": percent(two_tokens), "TDS": score[counted].mean().item(),
        "pairs": 100 * metrics["pair_accuracy"].item(),
        "gap": percent(best_order) - percent(correct),
        "turn": 1 + answers.decode_rank[:, toy_data.FACTOR].float().mean().item(),
        "factors": factors, "effective": effective,
        "TDS curve": curve[counted.any(0)].tolist(),
        "per problem": [percent(samples) for samples in correct.split(config.samples)],
        "pass@k": toy_data.pass_at(correct.view(-1, config.samples))}
    return figures, (answers, correct)

# == 14. The demo ==================================================================================

def pretrained(config, seed, splits, device, bases):
    """The base of a seed: from `bases` {seed: weights} if it is there, else trained and added."""
    torch.manual_seed(seed)                      # the initial weights
    model = Denoiser(len(toy_data.VOCABULARY), toy_data.PROMPT_LENGTH + toy_data.RESPONSE_LENGTH,
                     config.layers, config.width, config.heads).to(device)
    say(f"    {sum(weight.numel() for weight in model.parameters()):,} parameters")
    if seed in bases:
        model.load_state_dict(bases[seed])
        return model.eval()
    *corpus, weight = toy_data.pretraining_corpus(config.new_domain, splits)
    train(model, as_trajectories(*corpus).to(device), nelbo_loss, updates=config.pretrain_updates,
          batch_size=config.pretrain_batch, learning_rate=config.pretrain_learning_rate, warmup=100,
          seed=seed, label="pretraining", weight=weight, loss_lines=6)
    bases[seed] = model.state_dict()
    return model

def run_seed(config, seed, arms, device, bases):
    """The whole chain once -> every figure of the run; the weights of the TABOM model or None."""
    started, new, mask_id = time.time(), config.new_domain, toy_data.MASK_ID
    def stage(title):
        say(f"\n[{time.time() - started:4.0f} s] {title}")

    kept = " (kept in the base file)" if seed in bases else ""
    stage(f"Seed {seed}. Pretrain by the book (Eq. 1): {config.pretrain_updates} updates{kept}")
    splits = toy_data.split_problems(new, seed)
    base = pretrained(config, seed, splits, device, bases)
    tests = {domain: parts[config.split][:config.test_problems].to(device)
             for domain, parts in splits.items()}
    stage("Why order matters: right answers of the base in percent, by order of decoding")
    by_order = {domain: [percent(take_test(base, domain, problems, config, seed, order=order)[1])
                         for order in toy_data.SHOWN_ORDERS.values()]
                for domain, problems in tests.items()}
    say(toy_data.orders_table(new, by_order))
    stage("A trajectory: the base multiplies, the easiest position first (Eq. 2)")
    trajectory, _ = answer(base, "mul", tests["mul"][:1], None)
    entropies = [entropy[0] for _, _, entropy in replay(base, trajectory, mask_id=mask_id)]
    say(toy_data.draw_trajectory(trajectory, entropies))
    stage(f"Self-distillation (Def. 1): {config.queries} queries, {config.collect_order} order")
    queries = splits[new]["query"].to(device)
    distilled, asked = self_distil(base, queries, config, seed)
    reference = training_data("SFT-GT", distilled, asked, config, seed)
    held_out = (asked[:, None] == queries[::8]).all(2).any(1)            # every eighth problem
    say(f"    {len(distilled)} answers kept, {(~held_out).sum()} of them to train on\n"
        "    how unlikely responses are to the base: nats per masked token, by share (Fig. 3)")
    ratios = [ratio / 10 for ratio in range(1, 10)]
    with torch.no_grad():
        own_nll, reference_nll = (
            [nelbo_loss(base, data[held_out], mask_id=mask_id, mask_ratio=ratio,
                        generator=random_stream(seed, "masks", device))[0].item()
             for ratio in ratios] for data in (distilled, reference))
    say(toy_data.likelihood_table(ratios, own_nll, reference_nll))
    stage(f"Fine-tune: same base, same batch order, {config.updates} updates, last checkpoint")
    results, answers, tuned = {}, {}, None
    for name in dict.fromkeys(("No-SFT", *arms)):                        # the base first
        arm, own = toy_data.read_arm(name, config, ARMS)                 # own: its settings
        model = copy.deepcopy(base)
        if arm != "No-SFT":
            rows = ~held_out & toy_data.has_common_factor(distilled.response, own.common_factors)
            data = training_data(arm, distilled, asked, own, seed)[rows]
            train(model, data, arm_loss(arm, model, own), updates=own.updates,
                  batch_size=own.batch_size, learning_rate=own.learning_rate,
                  warmup=own.warmup, seed=seed, label=name)
            for weight, start in zip(model.parameters(), base.parameters()):   # part of the way
                weight.data.lerp_(start.data, 1 - own.tuned_share)
        results[name], answers[name] = evaluate(model, tests, distilled[held_out], own, seed)
        if name != "No-SFT":
            results[name]["change"] = toy_data.compare(results[name], results["No-SFT"])
        tuned = model.state_dict() if name == "TABOM" else tuned
        say(f"    {name:20}  new {results[name]['new']:5.1f}  old {results[name]['old']:5.1f}")
    text, claims = toy_data.report(results, answers, own_nll, reference_nll)
    say(text)
    return {"arms": results, "mask ratios": ratios, "self-distilled nll": own_nll,
            "reference nll": reference_nll, "valid": len(distilled),
            "claims": claims, "seconds": time.time() - started}, tuned

# == 15. The command line ==========================================================================

def demo(options):
    """Check everything first, then run the seeds; all files are written anew after each."""
    config = toy_data.make_config(options.set, options.quick)
    toy_data.check_options(options)
    arms, seeds = options.arms, options.seeds
    for name in arms:
        toy_data.read_arm(name, config, ARMS)    # a wrong name or setting is reported here
    bases = toy_data.load_models(options.base, config) if os.path.exists(options.base or "") else {}
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    say(toy_data.greeting(hardware, seeds, arms, options.quick))
    runs, models = {}, {}
    for seed in seeds:
        runs[seed], models[seed] = run_seed(config, seed, arms, device, bases)
        if options.base:
            toy_data.save_models(options.base, config, bases)
        if options.save:
            toy_data.save_models(options.save, config, models)
        if options.json:
            toy_data.write_report(options.json, config, seeds, options.quick, hardware, runs)
    if len(runs) > 1:
        say(toy_data.report_of_seeds(runs.values()))
    say(f"\nDone in {sum(run['seconds'] for run in runs.values()) / 60:.1f} minutes on {hardware}.")

def main(arguments=None):
    """Run the command line -> exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    if toy_data is None:
        print("tabom.py: toy_data.py is missing; it belongs beside tabom.py.", file=sys.stderr)
        return 2
    options = toy_data.parse_arguments(arguments, ARMS, __doc__.split("\n")[0])
    try:
        if options.demo or options.quick:
            demo(options)
    except DemoError as error:
        print(f"tabom.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntabom.py: stopped; no file is left half-written.", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")     # for a terminal that has no × or █
    sys.exit(main())
