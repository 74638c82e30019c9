/* waiting.h: what a job waits for, as a line of text beside its journal, for people; there only while it waits. */
#ifndef AGENT_WAITING_H
#define AGENT_WAITING_H

/* Say why. What storage refuses is logged: the wait goes on. */
void waiting_note(const char *folder, const char *causes);
void waiting_over(const char *folder);

#endif
