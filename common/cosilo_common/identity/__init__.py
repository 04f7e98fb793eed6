"""Who is who in a federation: names, keys, certificates, the members list, invitations, and TLS credentials made of
them.

Must not know rounds, stores or torch. Import the module you mean; this package re-exports nothing.
"""
