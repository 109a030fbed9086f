"""Models: loading them, and DeltaNet2, which no library ships and which transformers knows once this is imported."""

import fla_torch as fla_torch  # before fla, which warns where there is no GPU: this silences it

from keyreduce.models import delta_net_2 as delta_net_2
