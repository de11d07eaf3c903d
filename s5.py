"""S5: a diagonal linear state space that remembers, in parallel and step by step.

    x'(t) = Λ x(t) + B̃ u(t),   y(t) = C̃ x(t) + D u(t)             (S5 1)
    Λ̄ = exp(ΛΔ),   B̄ = s · Λ⁻¹(Λ̄ - 1) B̃                           (S5 2)
    x_t = (1 - is_first_t) Λ̄ ⊙ x_{t-1} + B̄ u_t                     (S5 3)
    y_t = 2 Re(C̃ x_t) + D ⊙ u_t                                    (S5 4)
    (a_j, b_j) ∘ (a_i, b_i) = (a_j a_i, a_j b_i + b_j)              (S5 5)
    u ← u + GELU(W · S5(LN(u))),  N times, then LN                  (S5 6)
    A = -½ I + N,  N_nk = ∓½ √(2n+1) √(2k+1), - for n > k;  = V Λ V⁻¹  (S5 7)

Only one of each conjugate pair is kept, hence 2 Re. The state scale s = Δ^(-1/2)
gives slow modes, which are the memory, the same size as fast ones. Resets multiply
the decay, so (S5 5) stays the ordinary operator of a linear recurrence.

Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence
Modeling", ICLR 2023; Gu et al., "HiPPO", NeurIPS 2020. Official:
resettable_s5/s5_model.py.
Differs from the official code in: Δ5 conjugate pairs, Δ6 Re Λ < 0, Δ7 scale of C̃,
Δ8 final LayerNorm, Δ9 no dropout, Δ22 state scale.

Axes: T time, H features, P complex states, N layers. x is the state, not an image.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, PRNGKeyArray

LAYER_NORM_EPS = 1e-3


def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues Λ (size/2,) with Im > 0 and eigenvectors V (size, size/2). (S5 7)

    The conjugate half of the spectrum is left out. Computed in float64 on the host.
    """
    q = np.sqrt(2 * np.arange(size) + 1)
    lower = np.tril(np.outer(q, q), -1) / 2
    antisymmetric = lower.T - lower
    imag, V = np.linalg.eigh(-1j * antisymmetric)
    keep = imag > 0
    return -0.5 + 1j * imag[keep], V[:, keep]


def scan_sequential(
    a: Complex[Array, "T P"], b: Complex[Array, "T P"], x0: Complex[Array, " P"]
) -> Complex[Array, "T P"]:
    """x_t = a_t x_{t-1} + b_t one step after the other."""

    def step(x, ab):
        x = ab[0] * x + ab[1]
        return x, x

    return jax.lax.scan(step, x0, (a, b))[1]


def scan_parallel(
    a: Complex[Array, "T P"], b: Complex[Array, "T P"], x0: Complex[Array, " P"]
) -> Complex[Array, "T P"]:
    """The same x_t in log T rounds of the operator (S5 5)."""

    def compose(i, j):
        return j[0] * i[0], j[0] * i[1] + j[1]  # (S5 5)

    return jax.lax.associative_scan(compose, (a, b.at[0].add(a[0] * x0)))[1]


def linear_recurrence(
    a: Complex[Array, "T P"],
    b: Complex[Array, "T P"],
    x0: Complex[Array, " P"],
    *,
    parallel: bool | None = None,
) -> Complex[Array, "T P"]:
    """x_t = a_t x_{t-1} + b_t; `parallel` None takes the form fast on this backend.

    On a CPU the sequential form wins in run time and in compile time.
    """
    if parallel is None:
        parallel = jax.default_backend() != "cpu"
    return (scan_parallel if parallel else scan_sequential)(a, b, x0)


class DiscreteS5(eqx.Module):
    """An S5 layer for a fixed step Δ: what one call computes once and reuses."""

    Lambda_bar: Complex[Array, " P"]
    B_bar: Complex[Array, "P H"]
    C_tilde: Complex[Array, "H P"]
    D: Float[Array, " H"]

    @property
    def states(self) -> int:
        return self.Lambda_bar.shape[0]

    def discretise(self) -> "DiscreteS5":
        """Itself: it is discrete already."""
        return self

    def _inputs(self, u: Float[Array, "*T H"]) -> Complex[Array, "*T P"]:
        # Two real products cost half of one complex product with a real input.
        return jax.lax.complex(u @ self.B_bar.real.T, u @ self.B_bar.imag.T)

    def _outputs(
        self, x: Complex[Array, "*T P"], u: Float[Array, "*T H"]
    ) -> Float[Array, "*T H"]:
        real = x.real @ self.C_tilde.real.T - x.imag @ self.C_tilde.imag.T
        return 2 * real + self.D * u  # (S5 4)

    def scan(
        self,
        u: Float[Array, "T H"],
        is_first: Bool[Array, " T"],
        x0: Complex[Array, " P"],
        *,
        parallel: bool | None = None,
    ) -> tuple[Complex[Array, "T P"], Float[Array, "T H"]]:
        """States and outputs of a whole sequence that starts from x0. (S5 3)"""
        a = jnp.where(is_first[:, None], 0, self.Lambda_bar)
        x = linear_recurrence(a, self._inputs(u), x0, parallel=parallel)  # (S5 3)
        return x, self._outputs(x, u)

    def step(
        self,
        x: Complex[Array, " P"],
        u: Float[Array, " H"],
        is_first: Bool[Array, ""],
    ) -> tuple[Complex[Array, " P"], Float[Array, " H"]]:
        """One step of the same recurrence. (S5 3)"""
        a = jnp.where(is_first, 0, self.Lambda_bar)
        x = a * x + self._inputs(u)  # (S5 3)
        return x, self._outputs(x, u)


class S5(eqx.Module):
    """One S5 layer in continuous time; all parameters are real. (S5 1)

    Adam diverges on complex leaves, whose JAX gradients are conjugated.
    """

    log_neg_Lambda_re: Float[Array, " P"]
    Lambda_im: Float[Array, " P"]
    B_re: Float[Array, "P H"]
    B_im: Float[Array, "P H"]
    C_re: Float[Array, "H P"]
    C_im: Float[Array, "H P"]
    D: Float[Array, " H"]
    log_Delta: Float[Array, " P"]
    scaled: bool = eqx.field(static=True)

    def __init__(
        self,
        features: int,
        states: int,
        blocks: int,
        *,
        scaled: bool = True,
        key: PRNGKeyArray,
    ):
        """`states` P complex numbers in `blocks` HiPPO blocks of 2P/blocks.

        Raises ValueError unless 2P/blocks is an even whole number.
        """
        if blocks < 1 or states % blocks:
            raise ValueError(f"{blocks} blocks do not divide {states} states")
        B_key, C_key, D_key, Delta_key = jax.random.split(key, 4)
        size = 2 * states // blocks
        Lambda, V = hippo_normal(size)
        B = jax.random.normal(B_key, (blocks, size, features)) / np.sqrt(features)
        C = jax.random.normal(C_key, (blocks, features, size)) / np.sqrt(2 * states)
        B = jnp.einsum("sp,bsh->bph", V.conj(), B.astype(complex))
        C = jnp.einsum("bhs,sp->hbp", C.astype(complex), V)
        B = B.reshape(states, features)
        C = C.reshape(features, states)
        self.log_neg_Lambda_re = jnp.log(jnp.tile(-Lambda.real, blocks)).astype(float)
        self.Lambda_im = jnp.tile(Lambda.imag, blocks).astype(float)
        self.B_re, self.B_im = B.real, B.imag
        self.C_re, self.C_im = C.real, C.imag
        self.D = jax.random.uniform(D_key, (features,))
        self.log_Delta = jax.random.uniform(
            Delta_key, (states,), minval=np.log(0.001), maxval=np.log(0.1)
        )
        self.scaled = scaled

    @property
    def states(self) -> int:
        return self.log_Delta.shape[0]

    def discretise(self) -> DiscreteS5:
        """Zero-order hold with the state scale s = Δ^(-1/2), or 1 unscaled. (S5 2)"""
        Delta = jnp.exp(self.log_Delta)
        Lambda = jax.lax.complex(-jnp.exp(self.log_neg_Lambda_re), self.Lambda_im)
        Lambda_bar = jnp.exp(Lambda * Delta)
        scale = jax.lax.rsqrt(Delta) if self.scaled else jnp.ones_like(Delta)
        B_tilde = jax.lax.complex(self.B_re, self.B_im)
        B_bar = (scale * (Lambda_bar - 1) / Lambda)[:, None] * B_tilde  # (S5 2)
        C_tilde = jax.lax.complex(self.C_re, self.C_im)
        return DiscreteS5(Lambda_bar, B_bar, C_tilde, self.D)


class S5Block(eqx.Module):
    """Pre-norm residual block around one S5 layer. (S5 6)"""

    norm: eqx.nn.LayerNorm
    ssm: S5 | DiscreteS5
    W: eqx.nn.Linear

    def _mix(self, u: Float[Array, " H"], y: Float[Array, " H"]) -> Float[Array, " H"]:
        return u + jax.nn.gelu(self.W(y))  # (S5 6)


class S5Stack(eqx.Module):
    """N S5 blocks and a final LayerNorm; `discretise` once, then scan or step.

    The carry is the complex state of all layers, (N, P). The argument `blocks` counts
    HiPPO blocks within a layer, the field holds the N layers.
    """

    blocks: tuple[S5Block, ...]
    norm: eqx.nn.LayerNorm

    def __init__(
        self,
        features: int,
        layers: int,
        states: int,
        blocks: int,
        *,
        scaled: bool = True,
        key: PRNGKeyArray,
    ):
        def block(key):
            ssm_key, W_key = jax.random.split(key)
            return S5Block(
                eqx.nn.LayerNorm(features, LAYER_NORM_EPS),
                S5(features, states, blocks, scaled=scaled, key=ssm_key),
                eqx.nn.Linear(features, features, use_bias=False, key=W_key),
            )

        self.blocks = tuple(block(k) for k in jax.random.split(key, layers))
        self.norm = eqx.nn.LayerNorm(features, LAYER_NORM_EPS)

    def discretise(self) -> "S5Stack":
        """The same stack with every layer discretised. (S5 2)"""
        blocks = tuple(
            eqx.tree_at(lambda b: b.ssm, block, block.ssm.discretise())
            for block in self.blocks
        )
        return eqx.tree_at(lambda s: s.blocks, self, blocks)

    def init_carry(self) -> Complex[Array, "N P"]:
        """The empty memory x = 0."""
        return jnp.zeros((len(self.blocks), self.blocks[0].ssm.states), complex)

    def scan(
        self,
        u: Float[Array, "T H"],
        is_first: Bool[Array, " T"],
        x0: Complex[Array, "N P"],
        *,
        parallel: bool | None = None,
    ) -> tuple[Complex[Array, "T N P"], Float[Array, "T H"]]:
        """States of all layers and the output, for a whole sequence. (S5 6)"""
        states = []
        for block, x in zip(self.blocks, x0, strict=True):
            normed = jax.vmap(block.norm)(u)
            x, y = block.ssm.scan(normed, is_first, x, parallel=parallel)
            u = jax.vmap(block._mix)(u, y)
            states.append(x)
        return jnp.stack(states, axis=1), jax.vmap(self.norm)(u)

    def step(
        self,
        x: Complex[Array, "N P"],
        u: Float[Array, " H"],
        is_first: Bool[Array, ""],
    ) -> tuple[Complex[Array, "N P"], Float[Array, " H"]]:
        """One step of the same stack. (S5 6)"""
        states = []
        for block, x_block in zip(self.blocks, x, strict=True):
            x_block, y = block.ssm.step(x_block, block.norm(u), is_first)
            u = block._mix(u, y)
            states.append(x_block)
        return jnp.stack(states), self.norm(u)
