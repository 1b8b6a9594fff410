"""All artifacts and what makes them."""


def artifact_makers() -> dict:
    "(function, its recipe) for each artifact that comes with the book, those that others need first."
    from diffusion_nb.experiments.ablation import ABLATION, run_ablation
    from diffusion_nb.experiments.consistency import DIGITS, run_consistency
    from diffusion_nb.experiments.digits import train_digits
    from diffusion_nb.experiments.distillation import GUIDED, run_distilled, run_from_fewer, run_guided
    from diffusion_nb.experiments.guidance import CLASSIFIER, GUIDANCE, run_guidance, train_classifier, train_weak
    from diffusion_nb.experiments.judge import JUDGE, train_judge
    from diffusion_nb.experiments.variance import BOUNDS, run_improved
    from diffusion_nb.experiments.vdm import TARGETS, run_targets, run_vdm, vdm_digits_recipe
    from diffusion_nb.recipes.diffusion import recipe
    from diffusion_nb.recipes.distillation import DISTILL
    from diffusion_nb.recipes.settings import settings

    GROUPS = dict(groups=int, seeds=int)

    def of(section, types):
        return vars(settings(section, **types))

    return {
        "digit_judge": (train_judge, of("01_data", JUDGE)),
        "mnist_judge": (train_judge, of("judge.mnist", JUDGE)),
        "digit_denoiser": (train_digits, recipe("digits")),
        "ablation": (run_ablation, of("ablation", ABLATION)),
        "noisy_classifier": (train_classifier, of("noisy_classifier", CLASSIFIER)),
        "weak_digits": (train_weak, recipe("weak-digits")),
        "guidance": (run_guidance, of("13_guidance", GUIDANCE)),
        "improved": (run_improved, of("bounds", BOUNDS)),
        "vdm": (run_vdm, vdm_digits_recipe()),
        "targets": (run_targets, of("targets", TARGETS)),
        "distilled": (run_distilled, of("17_distillation", GROUPS) | of("distill.digits", DISTILL)),
        "distilled_from_fewer": (run_from_fewer, of("17_distillation", GROUPS) | of("distill.digits-16", DISTILL)),
        "distilled_guided": (run_guided, of("distill.guided", GUIDED)),
        "consistency": (run_consistency, of("consistency", DIGITS)),
    }
