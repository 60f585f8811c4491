"""Layer responses (He et al. 2015, Fig. 7): how far each layer's output spreads, from the statistics batch norm has."""

from .measure import layer_responses
from .responses import LayerResponse, LayerResponses
from .watch import ResponseWatch, watch_responses

__all__ = ["LayerResponse", "LayerResponses", "ResponseWatch", "layer_responses", "watch_responses"]
