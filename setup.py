from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="balcap-mega",
    version="0.1.0",
    description="Balanced reinforcement learning for image captioners on Megatron-Core and vLLM",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The top-level folder `kernels/` is installed as `balcap_mega.kernels`, never as `kernels`: that name belongs to a
    # Hugging Face package which transformers and vLLM import when it is there.
    packages=[*find_packages(include=["balcap_mega", "balcap_mega.*"]), "balcap_mega.kernels"],
    package_dir={"balcap_mega.kernels": "kernels"},
    entry_points={
        # torch runs this at the end of `import torch` in every process, vLLM's servers and its model inspection included.
        "torch.backends": [
            "balcap_mega = balcap_mega.models.torchvision_operators:declare_torchvision_operators",
        ]
    },
    package_data={"balcap_mega": ["**/*.txt", "**/*.md", "**/*.json", "**/*.html"]},
)
