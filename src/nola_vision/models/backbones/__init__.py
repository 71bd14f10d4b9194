"""timm backbones: from a tag or a local file to a frozen model without a head."""
