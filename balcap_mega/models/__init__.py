from balcap_mega.models.torchvision_operators import declare_torchvision_operators

# Before anything here imports a transformers processor, which imports torchvision.
declare_torchvision_operators()
