/* signals.c: see signals.h. */
#include "signals.h"

#include <signal.h>
#include <stddef.h>

static volatile sig_atomic_t caught, in_unit, abandoned;

static void note_signal(int number) {
  if (caught != 0 && in_unit) abandoned = 1;
  caught = number;
}

void signals_install(void) {
  struct sigaction action = {.sa_handler = note_signal, .sa_flags = SA_RESTART};
  sigemptyset(&action.sa_mask);
  sigaddset(&action.sa_mask, SIGTERM);
  sigaddset(&action.sa_mask, SIGINT);
  sigaction(SIGTERM, &action, NULL);
  sigaction(SIGINT, &action, NULL);
  signal(SIGHUP, SIG_IGN);
}

void signals_ignore_writes(void) {
  signal(SIGXFSZ, SIG_IGN);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGCHLD, SIG_DFL); /* ignored by who started us, waitpid would find no child */
}

bool stop_requested(void) { return caught != 0; }
int stop_signal(void) { return caught; }

void unit_begin(void) {
  abandoned = 0;
  in_unit = 1;
}

void unit_end(void) { in_unit = 0; }
bool unit_abandoned(void) { return abandoned != 0; }
