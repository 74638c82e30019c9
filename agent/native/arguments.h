/* arguments.h: the arguments of the verbs that work on a spool. */
#ifndef AGENT_ARGUMENTS_H
#define AGENT_ARGUMENTS_H

#include "spool.h"

/* Options a verb takes: --spool DIR, --lease STORE:COUNTER[:takeover], --keep DIGEST …, --emulated. */
enum { TAKES_SPOOL = 1, TAKES_LEASE = 2, TAKES_KEEP = 4, TAKES_EMULATED = 8, WORDS = 2 };

typedef struct {
  const char *words[WORDS]; /* what is no option, in order */
  const char *spool, *lease; /* NULL: not given */
  char **keep;              /* [keep_count], in argv, whose order is changed */
  int keep_count;
  bool emulated;
} Arguments;

/* argv[0] is the verb; exactly `words` words are wanted, and --spool where it is taken. Errors: STI_INPUT. */
StiCode arguments_read(int argc, char **argv, int words, unsigned takes, Arguments *arguments, StiError *error);
/* The same, then open the spool, put back what a killed agent left changed, and let the lease in, if one was given. */
StiCode arguments_open(int argc, char **argv, int words, unsigned takes, Arguments *arguments, Spool *spool,
                       StiError *error);

#endif
