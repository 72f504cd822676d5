r"""Aligned Latent Models (ALM) as TorchRL components.

ALM trains an encoder, a latent dynamics model and a policy on one objective, a lower bound on the
return (Ghugare et al., 2023, https://arxiv.org/abs/2209.08466). The code uses these names:

========================  ===================================  ==============================
symbol of the paper       meaning                              name in the code
========================  ===================================  ==============================
:math:`s_t, a_t, r_t`     observation, action, reward          ``observation, action, reward``
:math:`z_t`               latent                               ``latent``
:math:`e_\phi(z|s)`       encoder                              ``encoder``
:math:`m_\phi(z'|z,a)`    latent dynamics                      ``dynamics``
:math:`\pi_\theta(a|z)`   policy                               ``actor``
:math:`r_\psi(z,a)`       reward model                         ``reward_model``
:math:`C_\psi(z,a,z')`    classifier                           ``classifier``
:math:`Q_\psi(z,a)`       action values, two critics           ``qvalue_network``
:math:`\gamma, \lambda`   discount, trace decay                ``gamma, lmbda``
:math:`c`                 weight of the log-ratio              ``consistency_coeff``
:math:`K`                 horizon, and length of the windows   ``horizon, window_length``
:math:`\tau`              rate of the target networks          ``tau, target_tau``
========================  ===================================  ==============================

Shapes: ``B`` is the batch, ``T`` the steps of a window, ``D`` the latent and ``A`` the action.

Examples:
    >>> from alm_torchrl import ALMAgent, ALMLoss
    >>> from torchrl.testing.mocking_classes import ContinuousActionVecMockEnv
    >>> agent = ALMAgent.from_env(ContinuousActionVecMockEnv(), latent_dim=8, hidden_dim=16)
    >>> loss = ALMLoss(**agent.networks(), horizon=3)
    >>> loss.out_keys[:2]
    ['loss_world_model', 'loss_reward']
"""

from typing import TYPE_CHECKING

from alm_torchrl.lazy import lazy_imports

if TYPE_CHECKING:
    from alm_torchrl.agent import ALMAgent
    from alm_torchrl.data import make_collector, make_replay_buffer
    from alm_torchrl.envs import make_env
    from alm_torchrl.objectives import ALMLoss

__version__ = "0.1.0"
__all__ = [
    "ALMAgent",
    "ALMLoss",
    "__version__",
    "make_collector",
    "make_env",
    "make_replay_buffer",
]
__getattr__, __dir__ = lazy_imports(  # so that ``import alm_torchrl`` stays fast
    globals(),
    {
        "ALMAgent": "alm_torchrl.agent",
        "ALMLoss": "alm_torchrl.objectives",
        "make_collector": "alm_torchrl.data",
        "make_env": "alm_torchrl.envs",
        "make_replay_buffer": "alm_torchrl.data",
    },
)
