/* identity.h: who this device is, which boot this is, and the agent's own version and digest. */
#ifndef AGENT_IDENTITY_H
#define AGENT_IDENTITY_H

#include "../../sti_runtime/native/engine.h"
#include "spool.h"

enum { MACHINE_TEXT = 17, EMULATED_ID_TEXT = 13, IDENTITY_TEXT = MACHINE_TEXT + EMULATED_ID_TEXT, BOOT_ID_TEXT = 65 };

/* 16 hex digits of a salted hash of the first there is: board serial, machine id, MAC address; *source says which.
 * The raw value never leaves the device. Errors: STI_INPUT if the device has none of them. */
StiCode machine_identity(char machine[MACHINE_TEXT], const char **source, StiError *error);
/* <machine> of a real device, <machine>/<emulated id> of an emulated one. */
StiCode device_identity(const Spool *spool, char identity[IDENTITY_TEXT], const char **source, StiError *error);
/* The mark in the spool, "" for a real device. Errors: STI_INPUT if it is damaged. */
StiCode emulated_id(const Spool *spool, char mark[EMULATED_ID_TEXT], StiError *error);
/* Mark the spool as an emulated device's; the id is derived from its path, so a cleaned one stays the same device. */
StiCode mark_emulated(const Spool *spool, StiError *error);
/* The kernel's id of this boot. Errors: STI_INPUT where the kernel does not tell. */
StiCode boot_id(char boot[BOOT_ID_TEXT], StiError *error);

const char *agent_version(void); /* "stifarm-agent-native 0.1.0 x86_64 avx2": name, version, architecture, kernels */
const char *agent_digest(void);  /* SHA-256 of this executable; "" if it cannot be read */
StiCode agent_digest_known(StiError *error); /* STI_INPUT if it cannot */

/* What STIFARM_ISA in the environment asks for, ISA_AUTO if nothing. Errors: STI_INPUT naming those there are. */
StiCode forced_isa(Isa *isa, StiError *error);

#endif
