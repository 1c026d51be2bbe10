"""The library's own OpenAI-compatible server, with HiP in every model that it loads.

    python extras/hip_serve.py FOLDER --port 8000

`transformers serve` takes no registered attention by name, so this registers HiP and switches every model to
it.  Options are those of `transformers serve`, with --continuous-batching many requests are read at a time;
HiP's settings are the dict "hip" in a model's config.json.
"""

import typer
from hip_transformers import register
from transformers.cli import serve
from transformers.cli.serving import model_manager


class ModelManager(model_manager.ModelManager):
    def _load_model(self, *args, **kwargs):
        model = super()._load_model(*args, **kwargs)
        model.set_attn_implementation("hip")
        return model


if __name__ == "__main__":
    register()
    model_manager.ModelManager = ModelManager  # the server looks it up when it starts
    typer.run(serve.Serve)
