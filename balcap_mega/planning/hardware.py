"""Peak rates of a cluster and the shares of them that the software reaches, each constant with its source."""

from dataclasses import dataclass

from balcap_mega.parallel import peaks

GIB = 2**30
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node. Rates are those of the device alone, before any `Efficiency`; a second, bytes, FLOPs.

    peak:             what a model-FLOPs utilisation is a share of
    memory:           what PyTorch reports as the device's total
    matmul:           bf16 FLOP/s of one large GEMM
    fp8_matmul:       the same in FP8
    attention:        FLOP/s of the forward pass of packed flash attention, counting only pairs inside the pattern
    memory_bandwidth: of a large copy
    nvlink, network, host: one direction, between GPUs of a node, between nodes for each GPU, and to the host's memory
    """

    name: str
    peak: peaks.Peak
    memory: float
    matmul: float
    fp8_matmul: float
    attention: float
    memory_bandwidth: float
    nvlink: float
    network: float
    host: float


H100 = Gpu(
    name="H100 SXM 80 GB",
    peak=peaks.H100,
    memory=79.1 * GIB,
    matmul=798e12,  # measured; NVIDIA's data sheet says 989
    fp8_matmul=1596e12,  # twice that, as in the data sheet
    attention=362e12,  # FlashAttention-2, which PyTorch ships; cuDNN through Transformer Engine reaches 600
    memory_bandwidth=3.0e12,  # measured; the data sheet says 3.35
    nvlink=450e9,  # data sheet, NVLink 4
    network=50e9,  # one 400 Gb/s InfiniBand adapter a GPU, as DGX H100 has
    host=55e9,  # PCIe 5.0 x16
)

CUDNN_ATTENTION = 600e12
"""Forward FLOP/s of cuDNN's attention through Transformer Engine at sequences of 2k to 16k, head size 128."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the hardware's rates, and host work that nothing hides. `published.ROWS` says what came of the fit.

    gemm:         of `Gpu.matmul`, by the GEMMs of a layer, forward and backward
    fp8_gemm:     of `Gpu.fp8_matmul`, quantisation of their operands included
    elementwise:  of `memory_bandwidth`, by norms, activations, rotary embeddings, residuals and the optimizer
    collective:   of `nvlink` and `network`, by NCCL
    decode:       of `memory_bandwidth`, by a decoding step that reads weights and the key/value cache
    engine_step:  seconds of scheduling and sampling in each decoding step
    rows:         of a tuned pretraining step's speed, by a reinforcement learner's passes over rows of changing length
    """

    gemm: float = 0.80  # fitted to two rows of Megatron-LM's table
    fp8_gemm: float = 0.6  # fitted to a row of Megatron-Bridge's
    elementwise: float = 0.85  # assumed
    collective: float = 0.8  # assumed
    decode: float = 0.8  # this and what follows are fitted to phases that NeMo-RL's blog gives
    engine_step: float = 5.5e-3
    rows: float = 0.78


@dataclass(frozen=True)
class Cluster:
    """`nodes` equal nodes. Tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages."""

    nodes: int
    gpus_per_node: int = 8
    gpu: Gpu = H100
    efficiency: Efficiency = Efficiency()

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Bytes a second that each of `ranks` ranks, `stride` apart, can send in a collective while all others do too.

        Ranks of a group that share a node share its adapters: a ring that leaves the node uses all of them.
        """
        gpu = self.gpu
        if (ranks - 1) * stride < self.gpus_per_node:
            return gpu.nvlink * self.efficiency.collective
        in_node = max(self.gpus_per_node // stride, 1)
        return min(gpu.nvlink, gpu.network * in_node) * self.efficiency.collective
