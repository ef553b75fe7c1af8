"""The one place for what this package relies on of vLLM's insides, which another version of vLLM may have otherwise.

process: settings that vLLM reads at import, and what it must leave alone in the trainer's process
engine:  registries, finalizers, the scale of the logits
reload:  a layer as a checkpoint fills it, and as its kernels compute with it
backend: the interface of a weight-transfer backend, and what the worker does for a refit

All is written for vLLM 0.32, which launch/*.lock pin. vLLM 0.24 is served too, since GPU hosts on which benchmarks are
run may have that version installed: it has no finalizer, asks more of a backend and of the caller of its worker, and
makes its GPU the default device while it updates weights, so that code which runs then names the device it means.
"""
