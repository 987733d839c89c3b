"""The editor as an HTTP service.

upload --api, form--> order --deployment (Serve handle)--> engine_editing --> ip2p_ray.engine
"""
