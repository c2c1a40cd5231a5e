"""The model: :class:`Retro`, a decoder with chunked cross-attention, and its GPT twin."""

from retro_jax.model.retro import Retro as Retro
from retro_jax.model.retro import count_parameters as count_parameters
from retro_jax.model.retro import unstacked as unstacked
from retro_jax.model.retro import with_vocab as with_vocab
