"""Cross-entropy of a linear layer's logits that never holds all logits."""

from retro_jax.kernels.linear_cross_entropy.api import gradients as gradients
from retro_jax.kernels.linear_cross_entropy.api import loss_and_cross_entropy as loss_and_cross_entropy
from retro_jax.kernels.linear_cross_entropy.api import scaled as scaled
from retro_jax.kernels.linear_cross_entropy.api import token_losses as token_losses
from retro_jax.kernels.linear_cross_entropy.api import weighted_loss as weighted_loss
