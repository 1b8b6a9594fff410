"""Diffusion models: schedules, denoisers, samplers, objectives and likelihoods, exported from a book of notebooks.

`import diffusion_nb as dn` is enough for most uses: the names below are those of the modules beside them, imported when they are first asked for.
"""

from importlib import import_module

__version__ = "0.0.1"

FACE = {
    "noise": "Noise BrownianPath",
    "schedules": "Schedule DDPMSchedule VPSchedule SubVPSchedule CosineSchedule VESchedule EDMSchedule LearnedSchedule StraightSchedule linear_betas cosine_betas zero_terminal_snr",
    "grids": "time_grid quadratic_grid logsnr_grid edm_grid truncated_grid respaced_grid strided_grid",
    "time_samplers": "continuous_times chain_times log_normal_times LossSecondMomentSampler LevelSampler",
    "forward": "q_sample q_step q_posterior posterior_steps chain_steps offset_noise",
    "denoisers": "Denoiser NetDenoiser Prediction Clip Consistency predict_x0 predict_eps predict_v predict_score predict_velocity predict_edm edm_input edm_time step_index",
    "mixtures": "GaussianMixture GMMDenoiser ring_mixture",
    "variances": "fixed_small fixed_large learned_variance analytic_variance expected_eps2",
    "guidance": "CFG ClassifierGuidance AutoGuidance DynamicThreshold SelfConditioned interval",
    "codecs": "Codec fit_codec",
    "corruption": "Corruption Gaussian Blur Pool Mask Snow Restorer ancestral restoration_loss",
    "data": "Pictures digits mnist fashion_mnist cifar10 data_set",
    "losses.simple": "denoising_loss snr snr_plus_one truncated_snr min_snr velocity_weight",
    "losses.bound": "bound_loss hybrid_loss vlb_weight",
    "losses.vdm": "vdm_loss",
    "losses.consistency": "consistency_distillation consistency_training",
    "samplers.linear": "ddpm ddim ddim_step invert slerp dpmpp_2m dpmpp_2m_sde dpmpp_3m dpmpp_3m_sde",
    "samplers.guided": "guided_ddpm",
    "samplers.cascade": "upsample",
    "samplers.heun": "heun",
    "samplers.singlestep": "dpmpp_2s",
    "samplers.langevin": "langevin annealed_langevin",
    "samplers.sde": "reverse_sde predictor_corrector probability_flow",
    "samplers.consistency": "consistency_sample",
    "likelihood.bits": "bits_per_dim",
    "likelihood.continuous": "vdm_bits",
    "likelihood.flow": "log_likelihood flow_bits",
    "likelihood.lossless": "LosslessCodec lossless_encode lossless_decode",
    "nets.unet": "UNet",
    "nets.song": "SongUNet",
    "nets.dit": "DiT",
    "nets.edm2": "EDM2UNet",
    "nets.words": "BagOfWords",
    "nets.controlnet": "ControlNet",
    "nets.upsampler": "Upsampler",
    "nets.autoencoder": "KLAutoencoder",
    "nets.latent": "SmallAutoencoder",
    "nets.conditioning": "CrossAttention TokenReader",
    "metrics.features": "frechet_distance nearest_distance precision_recall density_coverage",
    "training.trainer": "Trainer",
    "training.batches": "flip_half",
    "training.lr": "warmup_cosine warmup_constant",
    "training.ema": "PowerEMA",
    "generation.generate": "generate",
    "generation.fast": "CompiledDenoiser",
    "training.folder": "PictureFolder PictureTable",
    "models.model": "Model",
    "util.images": "show animate",
    "experiments.digits": "digit_denoiser",
    "experiments.pictures": "mnist_denoiser fashion_denoiser cifar10_denoiser draw_pictures",
    "experiments.emoji": "emoji_denoiser draw_captions",
    "experiments.cascade": "emoji_upsampler enlarge_emoji",
    "experiments.latent": "mnist_codec mnist_latent draw_through",
}
HOME = {name: module for module, names in FACE.items() for name in names.split()}
__all__ = ["__version__", *HOME]


def __getattr__(name: str):
    if name not in HOME:
        raise AttributeError(
            f"diffusion_nb has no {name!r} at its top; the modules hold more than these: {', '.join(HOME)}"
        )
    value = globals()[name] = getattr(import_module(f"diffusion_nb.{HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
