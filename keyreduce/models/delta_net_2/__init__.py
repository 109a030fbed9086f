"""DeltaNet2, known to transformers under its model type once this package is imported.

``save_pretrained`` puts the code of this folder beside the weights, so that the result loads where keyreduce is not
installed, with ``trust_remote_code=True``. Hence the files here import one another relatively, and nothing else of
keyreduce.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_delta_net_2 import DeltaNet2Config
from .mixer_delta_net_2 import DeltaNet2, SharedShortConvolution
from .modeling_delta_net_2 import DeltaNet2ForCausalLM, DeltaNet2Model

AutoConfig.register(DeltaNet2Config.model_type, DeltaNet2Config, exist_ok=True)
AutoModel.register(DeltaNet2Config, DeltaNet2Model, exist_ok=True)
AutoModelForCausalLM.register(DeltaNet2Config, DeltaNet2ForCausalLM, exist_ok=True)

DeltaNet2Config.register_for_auto_class()
DeltaNet2Model.register_for_auto_class("AutoModel")
DeltaNet2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["DeltaNet2", "DeltaNet2Config", "DeltaNet2ForCausalLM", "DeltaNet2Model", "SharedShortConvolution"]
