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
        # torch runs this at the end of `import torch`, in every process: vLLM's servers and model inspection too.
        "torch.backends": [
            "balcap_mega = balcap_mega.models.torchvision_operators:declare_torchvision_operators",
        ]
    },
    # What the package itself imports, but vLLM, whose CPU build has another name. All is pinned in two places:
    # launch/cpu.lock (Linux without a GPU, Python 3.11) and launch/cuda.lock (H100, Python 3.12), which launch/lock.sh
    # resolves from this file and its extra `cuda`.
    install_requires=[
        "aiohttp>=3.14",
        "huggingface-hub>=1.0",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "megatron-core==0.16.1",
        "numpy>=2.0",
        "pillow>=12",
        "pyarrow>=20",
        "pydantic>=2.12",
        "pyyaml>=6.0",
        "rich>=14",
        "safetensors>=0.6",
        "tenacity>=9",
        "tensorboard>=2.20",
        "tokenizers>=0.23",
        "torch==2.13.0",
        "transformers>=5.16.1,<5.20",
        "typing-extensions>=4.12",
    ],
    extras_require={
        "cuda": [
            "nvidia-dali-cuda130==2.4.0",
            "nvidia-ml-py>=13",
            "transformer-engine[core-cu13,pytorch]==2.11.0",
            "vllm==0.32.0",
        ],
        "flash": ["flash-attn==2.8.3"],  # built from source against the torch that is installed
        "test": [
            "basedpyright==1.40.2",  # pyright whose wheels hold all it runs on: nothing is fetched from elsewhere
            "hypothesis==6.170.15",
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "vulture==2.16",
            "scikit-image==0.26.0",
            "trl==1.16.0",
            "uv==0.13.9",  # resolves launch/cuda.lock, see launch/lock.sh
        ],
    },
    package_data={"balcap_mega": ["**/*.txt", "**/*.md", "**/*.json", "**/*.html"]},
)
