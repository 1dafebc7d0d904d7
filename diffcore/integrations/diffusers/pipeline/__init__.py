"""DiffcorePipeline, export to pipelines that diffusers loads without diffcore, and pretrained
networks.
"""
