"""Models with LAVIS's names, casts and roundings; like LAVIS, it imports what no BLIP-2 needs."""

import decord
import torch
from iopath_of_lavis import g_pathmgr
from torch import nn
from transformers import OPTForCausalLM

from lavis.common.registry import registry
from lavis.models.eva_vit import create_eva_vit_g

manager = (decord, g_pathmgr)


class LayerNorm(nn.LayerNorm):
    """LAVIS's, which computes in float32 whatever it is given."""

    def forward(self, x):
        return super().forward(x.type(torch.float32)).type(x.dtype)


class QformerLayer(nn.Linear):
    def forward(self, x, image):
        return (super().forward(x) + image.mean(1, keepdim=True),)


class Bert(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([QformerLayer(6, 6), QformerLayer(6, 6)])
        self.words = nn.Embedding(20, 6)

    def forward(self, input_ids=None, query_embeds=None, attention_mask=None, encoder_hidden_states=None):
        x = query_embeds if input_ids is None else torch.cat([query_embeds, self.words(input_ids)], dim=1)
        for layer in self.encoder.layer:
            x = layer(x, encoder_hidden_states)[0]
        return (x,)


class Blip2Base(nn.Module):
    def __init__(self, img_size, vit_precision, freeze_vit, num_query_token):
        super().__init__()
        self.visual_encoder = create_eva_vit_g(img_size, vit_precision)
        self.visual_encoder.requires_grad_(not freeze_vit)
        self.ln_vision = LayerNorm(6)
        self.Qformer = nn.Module()
        self.Qformer.bert = Bert()
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_token, 6))

    def embeds(self, image):
        return self.ln_vision(self.visual_encoder(image))

    @staticmethod
    def tokens(texts):
        longest = max(len(text) for text in texts)
        ids = torch.tensor([[3 + ord(c) % 9 for c in text] + [1] * (longest - len(text)) for text in texts])
        return ids, (ids != 1).long()


@registry.register_model("blip2_opt")
class Blip2OPT(Blip2Base):
    def __init__(
        self, vit_model, img_size, vit_precision, freeze_vit, num_query_token, opt_model, prompt, max_txt_len
    ):
        super().__init__(img_size, vit_precision, freeze_vit, num_query_token)
        self.Qformer.bert.words = None
        self.opt_model = OPTForCausalLM.from_pretrained(opt_model, torch_dtype=torch.float16)
        self.opt_model.requires_grad_(False)
        self.opt_proj = nn.Linear(6, self.opt_model.config.hidden_size)

    def prefix(self, samples, texts):
        queries = self.query_tokens.expand(len(samples["image"]), -1, -1)
        output = self.Qformer.bert(query_embeds=queries, encoder_hidden_states=self.embeds(samples["image"]))[0]
        ids, mask = self.tokens(texts)
        embeds = torch.cat([self.opt_proj(output), self.opt_model.model.decoder.embed_tokens(ids)], dim=1)
        return embeds, torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), mask], dim=1), ids

    def forward(self, samples):
        embeds, mask, ids = self.prefix(samples, samples["text_input"])
        ignored = torch.full(self.query_tokens.expand(len(ids), -1, -1).shape[:2], -100)
        labels = torch.cat([ignored, ids.masked_fill(ids == 1, -100)], dim=1)
        output = self.opt_model(inputs_embeds=embeds, attention_mask=mask, return_dict=True, labels=labels)
        return {"loss": output.loss}

    @torch.no_grad()
    def generate(self, samples, num_beams=5, max_length=30):
        embeds, mask, _ = self.prefix(samples, [samples["prompt"]] * len(samples["image"]))
        self.opt_model.generate(inputs_embeds=embeds, attention_mask=mask, num_beams=num_beams, max_length=max_length)
        return ["some text"]


@registry.register_model("blip2_image_text_matching")
class Blip2ITM(Blip2Base):
    def __init__(self, vit_model, img_size, vit_precision, freeze_vit, num_query_token, max_txt_len):
        super().__init__(img_size, vit_precision, freeze_vit, num_query_token)
        self.itm_head = nn.Linear(6, 2)

    def forward(self, samples, match_head="itm"):
        ids, mask = self.tokens(samples["text_input"])
        queries = self.query_tokens.expand(len(ids), -1, -1)
        mask = torch.cat([torch.ones(queries.shape[:2], dtype=torch.long), mask], dim=1)
        found = self.Qformer.bert(ids, queries, mask, self.embeds(samples["image"]))[0]
        return self.itm_head(found).mean(1) if match_head == "itm" else found.mean((1, 2))
