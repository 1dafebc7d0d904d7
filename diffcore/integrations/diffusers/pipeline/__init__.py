"""DiffcorePipeline, and export to pipelines that diffusers loads without diffcore."""
