"""Who is who: identities, certificates, key files, enrolment, roster."""
