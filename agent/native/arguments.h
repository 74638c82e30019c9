/* arguments.h: the arguments of the verbs that work on a spool. */
#ifndef AGENT_ARGUMENTS_H
#define AGENT_ARGUMENTS_H

#include "spool.h"

/* What a verb takes: --spool DIR, --lease STORE:COUNTER[:takeover], --keep DIGEST …, --emulated, --commit, or any number
 * of words, which are digests. */
enum {
  TAKES_SPOOL = 1, TAKES_LEASE = 2, TAKES_KEEP = 4, TAKES_EMULATED = 8, TAKES_COMMIT = 16, TAKES_DIGESTS = 32,
  WORDS = 3
};

typedef struct {
  const char *words[WORDS]; /* what is no option, in order */
  const char *spool, *lease; /* NULL: not given */
  char **digests;           /* [digest_count], in argv, whose order is changed: words, or values of --keep */
  int digest_count;
  bool emulated, commit;
} Arguments;

/* argv[0] is the verb; exactly `words` words are wanted, and --spool where it is taken. Errors: STI_INPUT. */
StiCode arguments_read(int argc, char **argv, int words, unsigned takes, Arguments *arguments, StiError *error);
/* The same, then open the spool, put back what a killed agent left changed, and let the lease in, if one was given. */
StiCode arguments_open(int argc, char **argv, int words, unsigned takes, Arguments *arguments, Spool *spool,
                       StiError *error);

#endif
