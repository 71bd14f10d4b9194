"""From files on disk to batches: data sets, their images, the k-shot draw, transforms, and the LightningDataModule."""
