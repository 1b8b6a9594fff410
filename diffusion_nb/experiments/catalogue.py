"""All artifacts and what makes them."""


def artifact_makers() -> dict:
    "(function, its recipe) for each artifact that comes with the book, those that others need first."
    from diffusion_nb.experiments.ablation import AblationRecipe, run_ablation
    from diffusion_nb.experiments.cascade import (
        DigitsCascade,
        UpsamplerRecipe,
        run_digits_cascade,
        train_emoji_upsampler,
    )
    from diffusion_nb.experiments.clip import (
        ClipRecipe,
        decoder_recipe,
        guidance_recipe,
        prior_recipe,
        run_clip_guidance,
        run_unclip,
        train_clip,
        train_decoder,
        train_prior,
        unclip_recipe,
    )
    from diffusion_nb.experiments.cold import (
        ColdComparison,
        ColdRecipe,
        run_cold,
        train_cold_emoji,
        train_cold_mnist,
    )
    from diffusion_nb.experiments.consistency import DigitsConsistency, run_consistency
    from diffusion_nb.experiments.control import (
        digits_control_recipe,
        emoji_control_recipe,
        emoji_table_recipe,
        run_digits_control,
        run_emoji_control,
        train_emoji_control,
    )
    from diffusion_nb.experiments.digits import train_digits
    from diffusion_nb.experiments.distillation import (
        DigitsDistillation,
        GuidedRecipe,
        run_distilled,
        run_from_fewer,
        run_guided,
    )
    from diffusion_nb.experiments.dit import DiTComparison, run_comparison, train_mnist_dit
    from diffusion_nb.experiments.drawings import (
        draw_by_ladder,
        draw_with_variances,
        judge_few_calls,
        judge_solvers,
    )
    from diffusion_nb.experiments.emoji import EmojiJudgeRecipe, train_emoji, train_emoji_judge
    from diffusion_nb.experiments.encoder import EncoderRecipe, train_encoder
    from diffusion_nb.experiments.guidance import (
        GuidanceRecipe,
        NoisyClassifierRecipe,
        run_guidance,
        train_classifier,
        train_weak,
    )
    from diffusion_nb.experiments.judge import JudgeRecipe, train_judge
    from diffusion_nb.experiments.latent import (
        train_emoji_codec,
        train_emoji_latent,
        train_mnist_codec,
        train_mnist_latent,
    )
    from diffusion_nb.experiments.pictures import (
        PictureJudgeRecipe,
        train_fashion,
        train_mnist,
        train_picture_judge,
        train_pictures,
    )
    from diffusion_nb.experiments.reference import ReferenceRecipe, make_references
    from diffusion_nb.experiments.students import StudentsRecipe, run_students
    from diffusion_nb.experiments.variance import BoundsRecipe, run_improved
    from diffusion_nb.experiments.vdm import (
        CausesRecipe,
        TargetsRecipe,
        run_causes,
        run_targets,
        run_vdm,
        vdm_digits_recipe,
    )
    from diffusion_nb.experiments.words import WordRecipe, train_words
    from diffusion_nb.recipes.captions import CaptionRecipe
    from diffusion_nb.recipes.diffusion import recipe
    from diffusion_nb.recipes.dit import dit_recipe
    from diffusion_nb.recipes.latent import AutoencoderRecipe, LatentRecipe
    from diffusion_nb.recipes.settings import settings as of

    return {
        "digit_judge": (train_judge, of("01_data", JudgeRecipe)),
        "mnist_judge": (train_judge, of("judge.mnist", JudgeRecipe)),
        "digit_denoiser": (train_digits, recipe("digits")),
        "ladder": (draw_by_ladder, recipe("digits")),
        "few_calls": (judge_few_calls, recipe("digits")),
        "solvers": (judge_solvers, recipe("digits")),
        "variances": (draw_with_variances, recipe("digits")),
        "ablation": (run_ablation, of("ablation", AblationRecipe)),
        "noisy_classifier": (train_classifier, of("noisy_classifier", NoisyClassifierRecipe)),
        "weak_digits": (train_weak, recipe("weak-digits")),
        "guidance": (run_guidance, of("13_guidance", GuidanceRecipe)),
        "improved": (run_improved, of("bounds", BoundsRecipe)),
        "vdm": (run_vdm, vdm_digits_recipe()),
        "targets": (run_targets, of("targets", TargetsRecipe)),
        "causes": (run_causes, of("targets", CausesRecipe)),
        "distilled": (run_distilled, of("distill.digits", DigitsDistillation)),
        "distilled_from_fewer": (run_from_fewer, of("distill.digits-16", DigitsDistillation)),
        "distilled_guided": (run_guided, of("distill.guided", GuidedRecipe)),
        "cifar10_judge": (train_picture_judge, of("judge.cifar10", PictureJudgeRecipe)),
        "cifar10_small": (train_pictures, recipe("cifar10-small")),
        "mnist_small": (train_mnist, recipe("mnist-small")),
        "fashion_judge": (train_judge, of("judge.fashion-mnist", JudgeRecipe)),
        "fashion_small": (train_fashion, recipe("fashion-small")),
        "mnist_students": (run_students, of("mnist_students", StudentsRecipe)),
        "references": (make_references, of("references", ReferenceRecipe)),
        "emoji_judge": (train_emoji_judge, of("judge.emoji", EmojiJudgeRecipe)),
        "emoji": (train_emoji, of("recipe.emoji", CaptionRecipe)),
        "mnist_kl": (train_mnist_codec, of("codec.mnist", AutoencoderRecipe)),
        "mnist_vq": (train_mnist_codec, of("codec.mnist-vq", AutoencoderRecipe)),
        "mnist_latent": (train_mnist_latent, of("latent.mnist", LatentRecipe)),
        "emoji_kl": (train_emoji_codec, of("codec.emoji", AutoencoderRecipe)),
        "emoji_latent": (train_emoji_latent, of("latent.emoji", LatentRecipe)),
        "cascade_digits": (run_digits_cascade, of("20_cascade.digits", DigitsCascade)),
        "emoji_upsampler": (train_emoji_upsampler, of("20_cascade.emoji", UpsamplerRecipe)),
        "control_digits": (run_digits_control, digits_control_recipe()),
        "control_emoji": (train_emoji_control, emoji_control_recipe()),
        "control_emoji_table": (run_emoji_control, emoji_table_recipe()),
        "consistency": (run_consistency, of("consistency", DigitsConsistency)),
        "mnist_dit": (train_mnist_dit, dit_recipe("mnist-small")),
        "words": (train_words, of("26_discrete.mask", WordRecipe)),
        "words_edit": (train_words, of("26_discrete.edit", WordRecipe)),
        "words_encoded": (train_encoder, of("27_unified", EncoderRecipe)),
        "dit": (run_comparison, of("24_dit", DiTComparison)),
        "cold": (run_cold, of("25_cold", ColdComparison)),
        "cold_mnist": (train_cold_mnist, of("25_cold.mnist", ColdRecipe)),
        "cold_emoji": (train_cold_emoji, of("25_cold.emoji", ColdRecipe)),
        "emoji_clip": (train_clip, of("22_unclip.clip", ClipRecipe)),
        "emoji_prior": (train_prior, prior_recipe()),
        "emoji_decoder": (train_decoder, decoder_recipe()),
        "clip_guidance": (run_clip_guidance, guidance_recipe()),
        "unclip": (run_unclip, unclip_recipe()),
    }
