"""Builds the API reference from the docstrings: python tests/api_reference.py FOLDER. A warning is an error."""

import importlib.util
import pathlib
import pkgutil
import sys
import warnings


def build(folder):
    import pdoc

    # Names that are imported on first use: pdoc reads the dict of a module.
    for name in ("cmamba_jax", "cmamba_jax.data", "cmamba_jax.deploy", "cmamba_jax.train"):
        module = importlib.import_module(name)
        vars(module).update({public: getattr(module, public) for public in module.__all__})
    # pdoc's own warnings, such as of a reference that leads nowhere or a module that cannot be imported.
    warnings.filterwarnings("error", module="pdoc")
    warnings.filterwarnings("ignore", message="The module specification", module="pdoc")  # Found twice, see below.
    # What our classes inherit from other libraries; and types of theirs.
    warnings.filterwarnings("ignore", message=".* for (?!cmamba_jax|pallas_kernels)", module="pdoc")
    warnings.filterwarnings("ignore", message=".*(VersionOrStr|ArrayTree)", module="pdoc")
    pdoc.render.configure(docformat="google", show_source=False, footer_text="cmamba_jax")
    names = ["cmamba_jax", "pallas_kernels"]
    absent = {"__main__"} if importlib.util.find_spec("triton") else {"__main__", ".triton_gpu."}
    for name in names:
        module = importlib.import_module(name)
        # pdoc finds the modules of a package by itself, but of one with __all__ only those that it names.
        if hasattr(module, "__all__") and hasattr(module, "__path__"):
            found = (m.name for m in pkgutil.iter_modules(module.__path__, name + "."))
            names += [name for name in found if not any(part in name for part in absent)]
    pdoc.pdoc(*names, output_directory=pathlib.Path(folder))


if __name__ == "__main__":
    build(sys.argv[1])
