"""What an answer rests on: attribution to patches, attention maps, occlusion."""
