/* arguments.c: see arguments.h. */
#include "arguments.h"

#include <string.h>

#include "fence.h"
#include "settings.h"
#include "verbs.h"

static StiCode usage_error(const char *verb, const char *argument, const char *problem, StiError *error) {
  const Verb *known = verb_named(verb);
  return sti_fail(error, STI_INPUT, known == NULL ? "" : known->usage, "%s: %.200s %s.", verb, argument, problem);
}

/* The value of `--name VALUE` or `--name=VALUE` at argv[*at], which moves on; NULL if it is another option. */
static const char *option_value(int argc, char **argv, int *at, const char *name, bool *lacking) {
  size_t length = strlen(name);
  const char *argument = argv[*at];
  if (strncmp(argument, name, length) != 0 || (argument[length] != '\0' && argument[length] != '=')) return NULL;
  if (argument[length] == '=') return argument + length + 1;
  *lacking = *at + 1 >= argc || (argv[*at + 1][0] == '-' && argv[*at + 1][1] != '\0');
  return *lacking ? argument : argv[++*at];
}

static bool is_option(const char *argument) { return argument[0] == '-' && argument[1] != '\0'; }

/* Values of --keep move to the front of argv, over arguments that were read. */
static void read_keep(int argc, char **argv, int *at, Arguments *arguments) {
  while (*at + 1 < argc && !is_option(argv[*at + 1])) argv[1 + arguments->digest_count++] = argv[++*at];
}

static StiCode read_option(int argc, char **argv, int *at, unsigned takes, Arguments *arguments, StiError *error) {
  const char *argument = argv[*at], *value;
  bool lacking = false;
  if ((takes & TAKES_SPOOL) && (value = option_value(argc, argv, at, "--spool", &lacking)) != NULL)
    arguments->spool = value;
  else if ((takes & TAKES_LEASE) && (value = option_value(argc, argv, at, "--lease", &lacking)) != NULL)
    arguments->lease = value;
  else if ((takes & TAKES_KEEP) && strcmp(argument, "--keep") == 0)
    read_keep(argc, argv, at, arguments);
  else if ((takes & TAKES_EMULATED) && strcmp(argument, "--emulated") == 0)
    arguments->emulated = true;
  else if ((takes & TAKES_COMMIT) && strcmp(argument, "--commit") == 0)
    arguments->commit = true;
  else
    return usage_error(argv[0], argument, "is no option of this verb", error);
  return lacking ? usage_error(argv[0], argument, "wants a value", error) : STI_OK;
}

StiCode arguments_read(int argc, char **argv, int words, unsigned takes, Arguments *arguments, StiError *error) {
  int found = 0;
  bool only_words = false;
  *arguments = (Arguments){.digests = argv + 1};
  for (int at = 1; at < argc; at++) {
    if (!only_words && strcmp(argv[at], "--") == 0) only_words = true;
    else if (!only_words && is_option(argv[at])) STI_TRY(read_option(argc, argv, &at, takes, arguments, error));
    else if (takes & TAKES_DIGESTS) argv[1 + arguments->digest_count++] = argv[at];
    else if (found < words) arguments->words[found++] = argv[at];
    else return usage_error(argv[0], argv[at], "is one argument too many", error);
  }
  if (found < words) return usage_error(argv[0], "an argument", "is missing", error);
  if ((takes & TAKES_SPOOL) && arguments->spool == NULL) return usage_error(argv[0], "--spool", "is missing", error);
  return STI_OK;
}

StiCode arguments_open(int argc, char **argv, int words, unsigned takes, Arguments *arguments, Spool *spool,
                       StiError *error) {
  LeaseText lease;
  STI_TRY(arguments_read(argc, argv, words, takes | TAKES_SPOOL, arguments, error));
  STI_TRY(spool_open(arguments->spool, spool, error));
  settings_restore_left(spool);
  if (arguments->lease == NULL) return STI_OK;
  STI_TRY(lease_parse(arguments->lease, &lease, error));
  return fence_admit(spool, &lease.lease, error);
}
