/* locks.h: file locks between processes (flock): released by the kernel when their holder dies. */
#ifndef AGENT_LOCKS_H
#define AGENT_LOCKS_H

#include "spool.h"

enum { LABEL_CHARS = 201 };

typedef struct { int fd; } Lock;

/* Hold the lock at `path`, trying for wait_s seconds; `label` is written into it for whoever finds it held.
 * Errors: STI_BUSY naming `what` and the holder's label, STI_FORMAT when it cannot be opened, storage_error's. */
StiCode lock_hold(const char *path, double wait_s, const char *what, const char *label, Lock *lock, StiError *error);
void lock_release(Lock *lock);
void lock_read_label(const char *path, char label[LABEL_CHARS]); /* "" if there is none */

/* The spool's locks, as everyone asks for them. Held in the order run, deploy. */
StiCode hold_run(const Spool *spool, double wait_s, const char *label, Lock *lock, StiError *error);
StiCode hold_deploy(const Spool *spool, Lock *lock, StiError *error);

/* Hold the lock of the physical machine, waiting as long as it takes: timed units hold it alone, others together, so
 * that nothing of ours runs beside a timed unit. path NULL: the device has its machine to itself.
 * Errors: STI_STOPPED when stopping() became true first, STI_FORMAT, STI_RESOURCE. */
StiCode lock_hold_machine(const char *path, bool timed, bool (*stopping)(void), Lock *lock, StiError *error);

#endif
