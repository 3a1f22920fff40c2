"""A Video-LLM of a page that shares no code with transformers, and its family, as an outside package would have them.

model = VideoModel().eval()
model(tokens, video=video)                    # logits [R, S, vocab]
model.generate(tokens, video=video, new=8)    # tokens, then 8 more
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlytom_compile.families.base import Family

VOCABULARY, VIDEO, WIDTH, SIDE, PATCH = 60, 59, 32, 24, 4


class Attention(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, WIDTH // heads
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.projections())
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.before(x), mask)
        return x + self.mlp(self.between(x))


class VideoModel(nn.Module):
    """Frames of 24x24 in patches of 4x4: 36 a frame, 9 after pooling. A word is an id below 59, and 59 is a video's."""

    def __init__(self, layers: int = 4, seed: int = 0) -> None:
        super().__init__()
        patches = (SIDE // PATCH) ** 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
            self.places = nn.Parameter(0.2 * torch.randn(patches, WIDTH))
            self.layers = nn.ModuleList(Block() for _ in range(layers))
            self.projector = nn.Linear(WIDTH, WIDTH)
            self.words = nn.Embedding(VOCABULARY, WIDTH)
            self.decoder = nn.ModuleList(Block() for _ in range(2))
            self.answer = nn.Linear(WIDTH, VOCABULARY)
            for weight in (p for p in self.parameters() if p.dim() > 1 and p is not self.places):
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            nn.init.normal_(self.words.weight)

    def encode(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 36, C]"""
        x = self.patches(frames).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x = layer(x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """[N, 36, C] -> [N, 9, C]"""
        grid = self.projector(x).transpose(1, 2).unflatten(-1, (SIDE // PATCH, SIDE // PATCH))
        return F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)

    def see(self, video: Tensor) -> Tensor:
        """[V, F, 3, H, W] -> [V, F*9, C]"""
        tokens = self.pool(self.encode(video.flatten(0, 1)))
        return tokens.reshape(video.shape[0], -1, WIDTH)

    def read(self, tokens: Tensor, video: Tensor | None) -> Tensor:
        x = self.words(tokens)
        if video is not None:
            x = x.masked_scatter((tokens == VIDEO).unsqueeze(-1), self.see(video))
        return x

    def forward(
        self,
        tokens: Tensor | None = None,
        video: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = self.read(tokens, video) if embeddings is None else embeddings
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            causal = (causal & mask[:, None, None, :].bool()) | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        for layer in self.decoder:
            x = layer(x, causal)
        return self.answer(x)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        video: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        new: int = 8,
    ) -> Tensor:
        x = self.read(tokens, video) if embeddings is None else embeddings
        for _ in range(new):
            following = self(embeddings=x, mask=mask)[:, -1:].argmax(-1)
            tokens, x = torch.cat((tokens, following), 1), torch.cat((x, self.words(following)), 1)
            mask = None if mask is None else torch.cat((mask, torch.ones_like(following)), 1)
        return tokens


class HandWritten(Family):
    """What its author would write."""

    name = "the hand-written model"
    classes = ("handwritten.VideoModel",)
    names = {
        "input_ids": "tokens",
        "pixel_values_videos": "video",
        "inputs_embeds": "embeddings",
        "attention_mask": "mask",
    }

    def frame_shape(self, model):
        return 3, SIDE, SIDE

    def vision_tower(self, model):
        return model.layers

    def embedding(self, model):
        return model.words

    def video_token(self, model):
        return VIDEO

    def rows(self, model, pixels):
        return model.see(pixels)
