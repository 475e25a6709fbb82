"""Images from a diffusion transformer, as sample.py draws them: the same seed, index and label give the same image."""

from dataclasses import replace

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class SparseDiTPipeline(DiffusionPipeline):
    """`vae` None: the autoencoder that the network's description names, or pixels, opened by the first call."""

    _optional_components = ["vae"]  # noqa: RUF012
    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer, scheduler, vae=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self._space = self._encoder = None

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        prompt=None,
        generator=0,
        num_inference_steps=None,
        guidance_scale=4.0,
        sampler=None,
        guidance_channels=None,
        guidance_interval=(0.0, 1.0),
        negative_prompt=None,
        text_encoder=None,
        batch_size=32,
        output_type="pil",
        return_dict=True,
    ):
        """Draw one image for each label or prompt.

        Args:
            class_labels: a number or name of a class, or a list of those; prompt: a text, or a list of them.
            generator: the seed, or a `torch.Generator`, whose initial seed that is. Image i of a seed is the same in
                any batch.
            num_inference_steps, sampler: as of sample.py; None: those that are usual for the objective.
            guidance_channels: a number, or "all"; None: as many as is usual for the objective.
            text_encoder: where the text encoder lies, if not where it lay in training: a folder or a hub name.
            output_type: "pil", "np" (N, H, W, 3) in [0, 1], or "pt" (N, 3, H, W) in [0, 1].
        """
        model, objective = self.transformer, self.scheduler.objective
        sampling, channels = model.module("sampling"), model.network.config.in_channels
        sampler = sampler or objective.samplers[0]
        if guidance_channels is None:
            guidance_channels = objective.guided_channels(channels, sampler)
        seed = generator.initial_seed() if isinstance(generator, torch.Generator) else int(generator)
        settings = sampling.Settings(
            num_inference_steps or objective.default_steps,
            sampler,
            guidance_scale,
            None if guidance_channels == "all" else guidance_channels,
            tuple(guidance_interval),
            seed,
        )
        kind, asked = self._asked(class_labels, prompt, negative_prompt, text_encoder)
        sampling.check_settings(model.network.config, objective, settings)
        batches = sampling.generate(
            Network(model, self._execution_device),
            objective,
            self._open_space(),
            asked,
            settings,
            kind=kind,
            batch_size=batch_size,
            progress=self.progress_bar,
        )
        images = [image for batch in batches for image in batch]  # (H, W, 3) uint8 each
        self.maybe_free_model_hooks()
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        else:
            images = torch.stack([torch.from_numpy(image) for image in images]).float() / 255
            images = images.numpy() if output_type == "np" else images.permute(0, 3, 1, 2)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _asked(self, class_labels, prompt, negative_prompt, text_encoder):
        """The kind of condition, and what `generate` takes for each image. Raises ValueError."""
        description = self.transformer.config.description
        kind, data = self.transformer.network.config.condition, description.get("data", {})
        if "text" not in description:
            if class_labels is None or prompt is not None or negative_prompt is not None:
                raise ValueError("this network draws from classes: class_labels, and no prompt")
            kind = replace(kind, names=tuple(data.get("class_names", ())))
            labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
            return kind, kind.parse([str(label) for label in labels])
        if prompt is None or class_labels is not None:
            raise ValueError("this network draws from texts: prompt, and no class_labels")
        if self._encoder is None:
            place = {} if text_encoder is None else {"name": text_encoder}
            self._encoder = self.transformer.module("text").open_encoder(**description["text"] | place)
        kind = replace(kind, encode=self._encoder.to(self._execution_device))
        if negative_prompt is not None:
            kind = replace(kind, nothing=negative_prompt)
        return kind, [prompt] if isinstance(prompt, str) else list(prompt)

    def _open_space(self):
        """What turns latents into images."""
        if self._space is None:
            space = self.transformer.config.description["space"]
            self._space = self.transformer.module("autoencoders").recorded_space(space, self.vae)
        return self._space.to(self._execution_device)


class Network:
    """The network as `generate` takes one; it is called as a part of the pipeline, which may have moved it."""

    def __init__(self, model, device):
        self.model, self.config, self.device = model, model.network.config, device

    def parameters(self):
        yield torch.empty(0, device=self.device)

    def __call__(self, *inputs):
        return self.model(*inputs)
