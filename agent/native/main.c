/* main.c: the agent's command line: VERB … --spool DIR. Verbs: docs/job-and-journal.md, docs/engine.md.
 *
 * Every verb prints one JSON object on standard output; a failed one prints {"error": {"remedy", "type", "what"}}.
 * Exit codes: 0 done; 1 failed; 2 the request is wrong; 3 refused; 4 storage full; 5 busy; 128 + n stopped by signal n.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "answers.h"
#include "identity.h"
#include "signals.h"
#include "units.h"
#include "verbs.h"

#define USAGE_ERROR "See --help."

static void print_usage(FILE *stream) {
  fprintf(stream, "%s\n\nusage: stifarm-agent VERB ...\n\n", agent_version());
  for (const Verb *verb = verbs; verb->name != NULL; verb++)
    fprintf(stream, "  %s\n      %s\n", verb->usage, verb->text);
}

/* The verb that is called. Errors: STI_INPUT when there is none. */
static StiCode find_verb(int argc, char **argv, const Verb **verb, StiError *error) {
  if (argc < 2) {
    print_usage(stderr);
    return sti_fail(error, STI_INPUT, USAGE_ERROR, "No verb is given.");
  }
  *verb = verb_named(argv[1]);
  return *verb != NULL ? STI_OK : sti_fail(error, STI_INPUT, USAGE_ERROR, "'%.80s' is no verb of this agent.", argv[1]);
}

static bool asks_for_help(const char *argument) {
  return strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0;
}

/* Run one verb; its exit code. What it prints goes to *out. */
static int run_verb(int argc, char **argv, Text *out) {
  StiError error = {0};
  const Verb *verb = NULL;
  int exit_code = 0;
  StiCode code = find_verb(argc, argv, &verb, &error);
  if (code == STI_OK && argc > 2 && asks_for_help(argv[2])) {
    text_printf(out, "usage: stifarm-agent %s\n%s", verb->usage, verb->text);
    return 0;
  }
  if (code == STI_OK) code = verb->call(argc - 1, argv + 1, out, &exit_code, &error);
  if (code == STI_OK && out->failed) code = sti_out_of_memory(&error);
  if (code == STI_OK) return exit_code;
  text_clear(out);
  write_error(out, &error);
  return sti_exit_code(code);
}

int main(int argc, char **argv) {
  Text out = {0};
  const char *sysfs = getenv("STIFARM_SYSFS"), *android = getenv("STIFARM_ANDROID");
  if (sysfs != NULL && *sysfs) kernel_roots.sys = sysfs;
  if (android != NULL && *android) kernel_roots.android = android;
  signals_ignore_writes();
  if (argc == 3 && strcmp(argv[1], "spawned") == 0) return spawned_main(argv[2]);
  if (argc > 1 && asks_for_help(argv[1])) {
    print_usage(stdout);
    return 0;
  }
  int exit_code = run_verb(argc, argv, &out);
  if (out.length > 0) text_append(&out, "\n", 1);
  if (out.failed) {
    exit_code = sti_exit_code(STI_RESOURCE);
    print_out_of_memory();
    text_clear(&out);
  }
  bool written = out.length == 0 || fwrite(out.data, 1, out.length, stdout) == out.length;
  bool printed = written && fflush(stdout) == 0;
  text_free(&out);
  return printed || exit_code != 0 ? exit_code : 1;
}
