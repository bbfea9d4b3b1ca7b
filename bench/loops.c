/* The client of bench.requests: one system call in a loop, for a time or a number of names. In C, because a loop in Python
 * costs about as much as the fastest servers here. It speaks the protocol of bench/client.py.
 *
 * usage: loops stat DIR FIRST COUNT SECONDS    names fFIRST ..., again and again; with SECONDS 0 each once
 *        loops missing DIR TAG 0 SECONDS       names that do not exist, each once
 *        loops read FILE SIZE SPAN SECONDS     pread of SIZE bytes at each offset below SPAN in turn
 *        loops write FILE SIZE SPAN SECONDS    also read_direct and write_direct: with O_DIRECT
 *        loops files DIR FIRST COUNT 0         open, read 4 KiB, close, each file once */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *operation, *path;
static long first, count;
static int fd = -1;
static char *buffer;

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static double cpu_seconds(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s %s: %s\n", operation, what, strerror(errno));
	exit(1);
}

static void stat_one(long number)
{
	char name[32];
	struct stat attributes;

	snprintf(name, sizeof(name), "f%ld", first + number % count);
	if (stat(name, &attributes) < 0)
		fail(name);
}

static void missing_one(long number)
{
	char name[64];
	struct stat attributes;

	snprintf(name, sizeof(name), "missing%ld-%ld", first, number);
	if (stat(name, &attributes) == 0 || errno != ENOENT)
		fail(name);
}

static void read_one(long number)
{
	if (pread(fd, buffer, first, number % (count / first) * first) != first)
		fail(path);
}

static void write_one(long number)
{
	if (pwrite(fd, buffer, first, number % (count / first) * first) != first)
		fail(path);
}

static void file_one(long number)
{
	char name[32];

	snprintf(name, sizeof(name), "f%ld", first + number % count);
	fd = open(name, O_RDONLY);
	if (fd < 0 || read(fd, buffer, 4096) != 4096)
		fail(name);
	close(fd);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*one)(long);
		int flags;
	} operations[] = { { "stat", stat_one, -1 },
			   { "missing", missing_one, -1 },
			   { "files", file_one, -1 },
			   { "read", read_one, O_RDONLY },
			   { "read_direct", read_one, O_RDONLY | O_DIRECT },
			   { "write", write_one, O_WRONLY },
			   { "write_direct", write_one, O_WRONLY | O_DIRECT } };
	size_t chosen = 0;
	long done = 0;
	double seconds, start, end;

	if (argc != 6)
		return 2;
	operation = argv[1];
	path = argv[2];
	first = atol(argv[3]);
	count = atol(argv[4]);
	seconds = atof(argv[5]);
	while (strcmp(operations[chosen].name, operation) != 0)
		if (++chosen == sizeof(operations) / sizeof(operations[0]))
			return 2;
	if (posix_memalign((void **)&buffer, 4096, 1 << 20) != 0)
		fail("memory");
	memset(buffer, 1, 1 << 20);
	if (operations[chosen].flags < 0 ? chdir(path) < 0 : (fd = open(path, operations[chosen].flags)) < 0)
		fail(path);
	printf("ready\n");
	fflush(stdout);
	while (getchar() != EOF)
		;
	start = end = now();
	if (seconds > 0) {
		for (; end - start < seconds; end = now())
			for (long batch = first >= 1 << 20 ? 1 : 32; batch; batch--)
				operations[chosen].one(done++);
	} else {
		while (done < count)
			operations[chosen].one(done++);
		end = now();
	}
	printf("{\"operations\": %ld, \"start\": %.9f, \"end\": %.9f, \"cpu\": %.6f}\n", done, start, end, cpu_seconds());
	return 0;
}
