"""BLIP-2 as LAVIS computes it, of transformers' own parts: with CLIP's ViT-L, or with an epsilon of its own behind
EVA's ViT-g."""
